"""Loss, optimizer and schedule, timm's and torch's own."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import nn

from s2a_fx.errors import InputError
from s2a_fx.finetune.options import FinetuneOptions


def make_loss(options: FinetuneOptions) -> nn.Module:
    """Cross-entropy; of the soft targets that mixup makes, in which the labels are smoothed already."""
    return (
        SoftTargetCrossEntropy()
        if options.mixup or options.cutmix
        else nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)
    )


def no_decay(model: nn.Module) -> frozenset[str]:
    """The parameters that a timm model asks not to decay: tokens, position embeddings, biases of relative positions."""
    return frozenset(getattr(model, "no_weight_decay", frozenset)())


def make_optimizer(
    model_or_parameters: nn.Module | Iterable[nn.Parameter], options: FinetuneOptions, not_decaying: Collection[str] = ()
) -> torch.optim.Optimizer:
    """timm's optimizer of the options' name, over what trains; biases, norms and what is named do not decay.

    Raises:
        InputError: timm knows none of this name, or it is of second order.
    """

    def groups(model: nn.Module) -> Any:
        return param_groups_weight_decay(model, options.weight_decay, no_weight_decay_list=not_decaying)

    try:
        optimizer = create_optimizer_v2(
            model_or_parameters,  # type: ignore[arg-type]
            options.optimizer,
            options.lr,
            options.weight_decay,
            param_group_fn=groups,
        )
    except (AssertionError, ValueError) as error:
        raise InputError(f"optimizer: timm refuses {options.optimizer!r}: {error}; give adamw, sgd, lion, ...") from error
    if getattr(optimizer, "is_second_order", False):
        raise InputError(
            f"optimizer: {options.optimizer!r} needs second derivatives, which no step here makes; give adamw, sgd, lion, ..."
        )
    return optimizer


def make_scheduler(optimizer: torch.optim.Optimizer, options: FinetuneOptions, updates_per_epoch: int) -> Any:
    """timm's cosine after a warm-up, told of every update by `step_update(number)`."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=options.epochs - options.warmup,
        warmup_epochs=options.warmup,
        warmup_prefix=True,
        warmup_lr=options.lr / 100,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler
