"""Compressed and uncompressed models side by side: the same draws, the same loss, and their gradients."""

import torch
import torch.nn.functional as F
from saved_bytes import cosine
from torch import nn


def step(model: nn.Module, x: torch.Tensor, seed: int = 1) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output and gradients, by parameter name and `input`, of one backward; the same `seed`, the same draws."""
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return y.detach(), {"input": x.grad, **grads}


def worst_cosine(actual: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The least cosine of a gradient with the exact one of its name; gradients that are zero but for rounding left out."""
    assert actual.keys() == exact.keys()
    assert all(g.isfinite().all() for g in actual.values())
    largest = max(g.norm() for g in exact.values())
    return min((cosine(actual[n], exact[n]), n) for n in exact if exact[n].norm() > 1e-6 * largest)


def assert_near(model: nn.Module, reference: nn.Module, x: torch.Tensor, least: float = 0.999) -> None:
    """The forward to the last bit, and every gradient's cosine above `least`."""
    y, exact = step(reference, x)
    output, actual = step(model, x)
    assert torch.equal(output, y)
    assert worst_cosine(actual, exact) > (least,)


def assert_same(model: nn.Module, reference: nn.Module, x: torch.Tensor) -> None:
    """Forward and gradients to the last bit."""
    (output, actual), (y, exact) = step(model, x), step(reference, x)
    assert torch.equal(output, y)
    assert actual.keys() == exact.keys()
    assert all(torch.equal(actual[n], exact[n]) for n in exact)


class Twice(nn.Module):
    """A module called twice in one forward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.inner(2 * x)


def ten_steps(model: nn.Module, x: torch.Tensor, lr: float = 1e-2) -> list[float]:
    """The losses of ten steps of AdamW over what trains, each with draws of its own."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for seed in range(10):
        torch.manual_seed(seed)
        loss = F.cross_entropy(model(x), torch.arange(x.shape[0]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def layers(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules of a class, by its name."""
    return [m for m in model.modules() if type(m).__name__ == name]
