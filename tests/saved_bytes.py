"""What autograd keeps, and how like two gradients are: what the tests of coded layers measure."""

import torch
import torch.nn.functional as F


class Kept:
    """Inside this context: the storages that autograd saves, parameters named in `but` left out. Afterwards: `nbytes`."""

    def __init__(self, *but: torch.Tensor) -> None:
        self.but = {t.untyped_storage().data_ptr() for t in but}
        self.storages: dict[int, torch.Tensor] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in self.but:
            self.storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def __enter__(self) -> "Kept":
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)
        self.nbytes = sum(t.untyped_storage().nbytes() for t in self.storages.values())


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine of the angle between two tensors; 1 if both are zero."""
    a, b = a.detach().double().flatten(), b.detach().double().flatten()
    if not a.any() and not b.any():
        return 1.0
    return F.cosine_similarity(a, b, 0).item()
