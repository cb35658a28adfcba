"""The optimizers that a simulated step can end in."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from s2a_fx.errors import InputError

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}


def stand_ins(
    optimizer: str | Callable[..., torch.optim.Optimizer] | None, parameters: Sequence[nn.Parameter], foreach: bool
) -> dict[nn.Parameter, int]:
    """The parameters to simulate an optimizer's step on, and for how many each stands.

    torch's own optimizers, in their one-by-one form, treat parameters of one shape alike and free what they allocate before the
    next: one of each shape tells all, and a third of the simulation's time is saved.
    """
    if not isinstance(optimizer, str) or foreach:
        return dict.fromkeys(parameters, 1)
    alike: dict[tuple[object, ...], list[nn.Parameter]] = {}
    for parameter in parameters:
        alike.setdefault((parameter.shape, parameter.stride(), parameter.dtype), []).append(parameter)
    return {group[0]: len(group) for group in alike.values()}


def make_optimizer(
    optimizer: str | Callable[..., torch.optim.Optimizer] | None, parameters: Sequence[nn.Parameter], foreach: bool
) -> torch.optim.Optimizer | None:
    """Build an optimizer over `parameters`, with torch's defaults.

    Args:
        optimizer: a name in `OPTIMIZERS`, a function from parameters to an optimizer, or None for none.
        foreach: for the named ones, their multi-tensor form, which torch takes by default on CUDA.

    Raises:
        InputError: `optimizer` is a name not in `OPTIMIZERS`.
    """
    if optimizer is None:
        return None
    if not isinstance(optimizer, str):
        return optimizer(parameters)
    if optimizer not in OPTIMIZERS:
        raise InputError(f"optimizer: got {optimizer!r}, wanted one of {', '.join(OPTIMIZERS)}.")
    return OPTIMIZERS[optimizer](parameters, foreach=foreach)
