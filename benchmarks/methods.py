"""The ways to fine-tune that benchmarks set side by side: name -> function(model, example) -> the module to train.

The recipes of s2a_fx, and what a user would pick instead:

    full, bias     the timm model as it is; biases and head, by the rule of the recipe `bias`
    peft-lora      PEFT's LoRA and the head: the paper's rank 48 on qkv, or rank 16 on a ConvNeXt's MLPs

Each takes the timm model over; build a fresh one for every method.
"""

from collections.abc import Callable

import torch
from torch import nn

import s2a_fx

Method = Callable[[nn.Module, torch.Tensor], nn.Module]

LORA_TARGETS = {"attn.qkv": 48, "mlp.fc1": 16, "mlp.fc2": 16}
"""Module name -> rank; the first that a model has, and those of the same rank, are adapted."""


def full(model: nn.Module, example: torch.Tensor) -> nn.Module:
    return model


def bias(model: nn.Module, example: torch.Tensor) -> nn.Module:
    return _train_as(model, example, "bias")


def lora(model: nn.Module, example: torch.Tensor) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise s2a_fx.InputError("peft-lora needs PEFT: pip install peft") from None
    names = [name for name, _ in model.named_modules()]
    rank = next((r for target, r in LORA_TARGETS.items() if any(n.endswith("." + target) for n in names)), None)
    if rank is None:
        raise s2a_fx.InputError(f"peft-lora: {type(model).__name__} has none of {', '.join(LORA_TARGETS)}")
    heads = {n for n, p in _train_as(model, example, "linear").named_parameters() if p.requires_grad}
    targets = [target for target, r in LORA_TARGETS.items() if r == rank]
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)).get_base_model()
    for name, parameter in adapted.named_parameters():
        if name in heads:
            parameter.requires_grad_(True)
    return adapted


def _train_as(model: nn.Module, example: torch.Tensor, recipe: str) -> nn.Module:
    """`model` itself, training what `recipe` trains: the graph's parameters keep the model's names."""
    graph = s2a_fx.transform(model, example, recipe)
    trained = {name for name, parameter in graph.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def _transformed(recipe: str) -> Method:
    return lambda model, example: s2a_fx.transform(model, example, recipe)


METHODS: dict[str, Method] = {
    **{recipe: _transformed(recipe) for recipe in (*s2a_fx.RECIPES, "full+checkpoint", "bias+checkpoint", "lora+compress")},
    "full": full,
    "bias": bias,
    "peft-lora": lora,
}
