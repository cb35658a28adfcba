"""Where the channels of a feature are found."""

import pytest
import torch
from torch import nn

import s2a_fx
from s2a_fx.graph.layout import Layout, layout_of


class Tokens(nn.Module):
    """A map's positions as tokens, and layers over their channels."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x.flatten(2).transpose(1, 2)).mean(1)


class LastChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    "reader", [Tokens(), LastChannels(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)], ids=lambda m: type(m).__name__
)
def test_a_convolved_map_has_its_channels_second_whatever_is_made_of_it_below(reader):
    gm = s2a_fx.trace(nn.Sequential(nn.Conv2d(3, 8, 1), reader), torch.randn(2, 3, 5, 6))
    convolution = next(node for node in gm.graph.nodes if node.target == "0")
    assert layout_of(gm, convolution) == Layout("BCHW", channels=8, height=5, width=6)
