"""What callers read of a model, beside its forward, on the graph module that was captured from it.

1. Plain attributes: `config`, `num_classes`, `pretrained_cfg`; data that the model's class holds: `main_input_name`.
2. Properties of the model's class, `device` or `base_model`, and `get_classifier`, which are asked of the graph's own modules.
3. What timm's optimizers and schedules ask of a model (`ASKED`). Other methods would run the model around the graph.
4. The names of the state dict, where a child of the model is called as an attribute of `fx.GraphModule` is: `meta`, `graph`.
5. What `train` and `eval` switch, where classes of the model override them: to leave batch norms in eval mode, say.
"""

import copy
import functools
import inspect
import pickle
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from s2a_fx.graph import torch_internals
from s2a_fx.graph.torch_internals import tree_leaves

ASKED = ("no_weight_decay", "no_weight_decay_keywords", "group_matcher")
"""Methods that tell which parameters decay, and which belong to one layer."""


class Skeleton:
    """A model without its weights, which answers what depends on names alone. Copies of a graph share it.

    It is pickled apart: a graph is read where the model's class is not known, and then answers nothing. What does not pickle, such
    as a lambda, is left out.

    Attributes:
        model: its tensors are on the meta device; None if it is not known.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.model = model
        self.lock = threading.Lock()  # a switch of the mode changes the model for a moment

    @staticmethod
    def of(model: nn.Module) -> "Skeleton":
        """The skeleton of a model that no capture has run: one leaves its proxies in what the forward writes to."""
        tensors = (*model.parameters(), *model.buffers(), *torch_internals.plain_tensors(model))
        return Skeleton(copy.deepcopy(model, {id(t): _on_meta(t) for t in tensors}))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Skeleton":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.model is None or can_pickle(self.model):
            return _read_skeleton, (pickle.dumps(self.model),)
        model = copy.deepcopy(self.model)
        for module in model.modules():
            for name, value in list(vars(module).items()):
                if name not in torch_internals.MODULE_TABLES and not can_pickle(value):
                    del vars(module)[name]
        return _read_skeleton, (pickle.dumps(model if can_pickle(model) else None),)


def can_pickle(value: Any) -> bool:
    """Whether `pickle` takes a value."""
    try:
        pickle.dumps(value)
    except Exception:  # pickle raises PicklingError, AttributeError, TypeError, and what reducers raise
        return False
    return True


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _read_skeleton(data: bytes) -> Skeleton:
    try:
        return Skeleton(pickle.loads(data))
    except Exception:  # whatever importing the model's module raises
        return Skeleton(None)


def copy_attributes(gm: nn.Module, skeleton: Skeleton) -> tuple[str, ...]:
    """Give `gm` the model's attributes that are data, but for those that it has itself (1); returns their names."""
    found = {name: value for name, value in vars(skeleton.model).items() if not hasattr(gm, name) and _is_data(value)}
    vars(gm).update(found)
    return tuple(found)


def _is_data(value: Any) -> bool:
    leaves = [getattr(leaf, "__self__", leaf) for leaf in tree_leaves(value)]  # a bound method is of its object
    return not any(isinstance(leaf, nn.Module | torch.Tensor) for leaf in leaves)


def answer_as(gm: nn.Module, skeleton: Skeleton) -> None:
    """Let the class of `gm`, which is that of no other module, answer as the model's: (1) to (3)."""
    if skeleton.model is None:
        return
    kind = type(skeleton.model)
    for name in _own_names(kind):
        value = inspect.getattr_static(kind, name)
        if isinstance(value, property | functools.cached_property):
            setattr(type(gm), name, property(functools.partial(_read, kind, name)))
        elif name == "get_classifier":
            setattr(type(gm), name, lambda gm: _read(kind, "get_classifier", gm)())
        elif name in ASKED:
            setattr(type(gm), name, staticmethod(getattr(skeleton.model, name)))
        elif not callable(value) and not hasattr(value, "__get__"):
            setattr(type(gm), name, value)


def _own_names(kind: type[nn.Module]) -> Iterator[str]:
    """The names that a class of models defines and that no graph module has."""
    taken = torch_internals.graph_module_names().union(dir(nn.Module))
    own = dict.fromkeys(name for base in kind.__mro__ if base not in nn.Module.__mro__ for name in vars(base))
    return (name for name in own if name not in taken and not name.startswith("__"))


def _read(kind: type[nn.Module], name: str, gm: nn.Module) -> Any:
    """What an instance of the model's class has by this name, over the attributes, modules and tensors of `gm`."""
    model: nn.Module = object.__new__(kind)
    own = torch_internals.graph_module_names()
    vars(model).update((attribute, value) for attribute, value in vars(gm).items() if attribute not in own)
    return getattr(model, name)


def switch_mode(module: nn.Module, skeleton: Skeleton, training: bool) -> None:
    """Switch `module`, a graph or its modules, to train or eval mode as the model does (5)."""
    nn.Module.train(module, training)
    model = skeleton.model
    if model is None or all(type(inner).train is nn.Module.train for inner in model.modules()):
        return
    own = dict(module.named_modules(remove_duplicate=False))
    with skeleton.lock:
        for path, inner in model.train(training).named_modules(remove_duplicate=False):
            if path in own:
                own[path].training = inner.training


def match_state(gm: fx.GraphModule, model: nn.Module, renamed: Mapping[str, str]) -> None:
    """Give `gm` the state dict of `model` (4).

    What no node of `gm` reads, or a region alone, is registered too: it trains, moves and is saved with the rest, as in the model.

    Args:
        renamed: what `free_names` returned for the model.
    """
    _register_rest(gm, model)
    buffers = dict(model.named_buffers(remove_duplicate=False))
    constants = [path for path, _ in gm.named_buffers(remove_duplicate=False) if path not in buffers]
    torch_internals.make_non_persistent(gm, (*torch_internals.non_persistent_buffers(model), *constants))
    if renamed:
        gm.register_state_dict_post_hook(functools.partial(_save_by_own_names, dict(renamed)))
        own = {name: new for new, name in renamed.items()}
        gm.register_load_state_dict_pre_hook(functools.partial(_load_by_own_names, own))


def _register_rest(gm: fx.GraphModule, model: nn.Module) -> None:
    """Register the layers, parameters and buffers of `model` that `gm` lacks."""
    held = dict(gm.named_modules(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        parameters, buffers = (dict(f(recurse=False)) for f in (module.named_parameters, module.named_buffers))
        if path not in held and next(module.children(), None) is None:
            gm.add_submodule(path, module)
            continue
        if path not in held and (parameters or buffers):
            held[path] = nn.Module()
            gm.add_submodule(path, held[path])
        for name, parameter in parameters.items():
            if not hasattr(held[path], name):
                held[path].register_parameter(name, parameter)
        for name, buffer in buffers.items():
            if not hasattr(held[path], name):
                held[path].register_buffer(name, buffer)


def free_names(model: nn.Module) -> dict[str, str]:
    """Rename children, parameters and buffers that are called as an attribute of `fx.GraphModule` is (4).

    The model still reads them by their own names.

    Returns:
        New name -> name, for `match_state`.
    """
    renamed = {}
    for name in torch_internals.entries(model):
        if name in torch_internals.graph_module_names():
            value = getattr(model, name)
            new = f"{name}_"
            while hasattr(model, new):
                new += "_"
            torch_internals.rename_entry(model, name, new)
            vars(model)[name] = value
            renamed[new] = name
    return renamed


def _save_by_own_names(renamed: dict[str, str], module: nn.Module, state: Any, prefix: str, local_metadata: Any) -> None:
    _rename_keys(state, prefix, renamed)
    versions = torch_internals.versions_by_path(state)
    versions.update({_renamed(path, prefix, renamed): version for path, version in versions.items()})


def _load_by_own_names(renamed: dict[str, str], module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    _rename_keys(state, prefix, renamed)


def _rename_keys(state: dict[str, Any], prefix: str, renamed: Mapping[str, str]) -> None:
    items = [(_renamed(key, prefix, renamed), value) for key, value in state.items()]
    state.clear()
    state.update(items)


def _renamed(key: str, prefix: str, renamed: Mapping[str, str]) -> str:
    """A path with its first name behind the prefix replaced."""
    first, dot, rest = key.removeprefix(prefix).partition(".")
    return f"{prefix}{renamed[first]}{dot}{rest}" if key.startswith(prefix) and first in renamed else key
