"""Modules that stand for a region of the graph."""

from torch import fx, nn


class Region(nn.Module):
    """Base of the modules that stand for a region of the graph.

    Args:
        bodies: the region's graphs by name, `body` among them.

    The modules that the bodies call stay registered where they are in the model, under their one name in the state dict: a region
    refers to them, and owns none.
    """

    body: fx.GraphModule

    def __init__(self, **bodies: fx.GraphModule) -> None:
        super().__init__()
        self.__dict__.update(bodies)

    def trained(self) -> list[nn.Parameter]:
        """The region's parameters that train."""
        return [p for p in self.body.parameters() if p.requires_grad]
