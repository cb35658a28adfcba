"""What callers give as a model: taken out of what wraps it, or refused for what it is."""

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from s2a_fx.errors import InputError
from s2a_fx.graph import torch_internals


def accept_model(model: nn.Module) -> nn.Module:
    """The module to trace: of one that `torch.compile` returned, the module inside.

    Raises:
        InputError: `model` is no module, or holds one whose Python code or plain weights are gone.
    """
    model = torch_internals.without_compiler(model)
    if not isinstance(model, nn.Module):
        raise InputError(f"model: got a {type(model).__name__}, wanted an nn.Module.")
    for path, module in model.named_modules():
        name = type(module).__name__ if not path else f"{path} ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"{name}: is compiled TorchScript, which has no Python code to trace and no layers to replace. Pass the model that "
                "was given to torch.jit.script or torch.jit.trace; its weights load with load_state_dict."
            )
        if any(isinstance(value, UninitializedParameter) for value in module.parameters(recurse=False)):
            raise InputError(f"{name}: has no weights yet. Call the model once, so that its lazy layers know their sizes.")
        if any(isinstance(value, torch.ScriptObject) for value in vars(module).values()):
            raise InputError(
                f"{name}: holds quantized weights, which no gradient passes. Pass the model as it was before it was quantized."
            )
    return model
