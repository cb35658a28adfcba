"""How a model is called: its example inputs, the tensors among them, and the structure of what it returns.

Inputs and results are pytrees: tensors in tuples, lists, dicts, dataclasses and whatever is registered as one, beside constants.
The tensors are the placeholders and results of the graph; the rest is part of its signature.
"""

import dataclasses
import inspect
import keyword
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from s2a_fx.errors import InputError
from s2a_fx.graph.torch_internals import SequenceKey, TreeSpec, tree_flatten, tree_flatten_with_path, tree_leaves, tree_unflatten


class Inputs:
    """Example inputs of a model that takes positional and keyword arguments: `Inputs(x, mask=mask)`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    @staticmethod
    def of(example_inputs: Any) -> "Inputs":
        """What a user gave: a tensor, a tuple or list of positional arguments, a dict of keyword arguments, or `Inputs`."""
        if isinstance(example_inputs, Inputs):
            return example_inputs
        if isinstance(example_inputs, torch.Tensor):
            return Inputs(example_inputs)
        if isinstance(example_inputs, Mapping) and all(isinstance(key, str) for key in example_inputs):
            return Inputs(**example_inputs)
        if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
            return Inputs(*example_inputs)
        raise InputError(
            f"example_inputs: got {type(example_inputs).__name__}, wanted a tensor, a tuple of positional arguments, a dict of "
            "keyword arguments, or s2a_fx.Inputs(*args, **kwargs), for example (torch.randn(2, 3, 224, 224),)."
        )


@dataclass(frozen=True)
class Structure:
    """Where the leaves of a value stand: a pytree, some of whose leaves are dataclasses that no pytree knows."""

    spec: TreeSpec
    dataclasses: tuple[tuple[int, type, "Structure", int], ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Structure":
        return self

    @staticmethod
    def of(value: Any) -> tuple[list[Any], "Structure"]:
        """The leaves of a value, constants and None among them, and its structure."""
        found, spec = tree_flatten(value)
        leaves: list[Any] = []
        opened = []
        for index, leaf in enumerate(found):
            if (fields := _fields(leaf)) is not None:
                inner, structure = Structure.of(fields)
                opened.append((index, type(leaf), structure, len(inner)))
                leaves += inner
            else:
                leaves.append(leaf)
        return leaves, Structure(spec, tuple(opened))

    @property
    def count(self) -> int:
        """How many leaves the value has."""
        return self.spec.num_leaves + sum(count - 1 for *_, count in self.dataclasses)

    @property
    def is_plain(self) -> bool:
        """Whether tuples, lists and dicts alone hold the leaves."""
        return not self.dataclasses and _is_plain_spec(self.spec)

    def build(self, leaves: Sequence[Any]) -> Any:
        """The value with these leaves."""
        given = iter(leaves)
        opened = {index: (kind, structure, count) for index, kind, structure, count in self.dataclasses}
        values = []
        for index in range(self.spec.num_leaves):
            if index in opened:
                kind, structure, count = opened[index]
                made: Any = object.__new__(kind)
                for name, field in structure.build([next(given) for _ in range(count)]).items():
                    object.__setattr__(made, name, field)
                values.append(made)
            else:
                values.append(next(given))
        return tree_unflatten(values, self.spec)


def _is_plain_spec(spec: TreeSpec) -> bool:
    return spec.is_leaf() or (spec.type in (tuple, list, dict) and all(map(_is_plain_spec, spec.children())))


@dataclass(frozen=True)
class _Given:
    """An argument of the example: its structure, and for each leaf the tensor's name, or None and the constant."""

    structure: Structure
    leaves: tuple[tuple[str | None, Any], ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.leaves if name is not None)

    def build(self, tensors: Mapping[str, Any]) -> Any:
        return self.structure.build([constant if name is None else tensors[name] for name, constant in self.leaves])

    def tensors(self, name: str, value: Any) -> dict[str, torch.Tensor]:
        """The tensors of another value of this argument; raises `InputError` if it differs in more than its tensors."""
        leaves, structure = Structure.of(value)
        if structure != self.structure:
            raise InputError(f"{name}: got another structure than the graph was captured with; {_ADVICE}")
        for (leaf_name, constant), leaf in zip(self.leaves, leaves, strict=True):
            if leaf_name is None and (type(leaf) is not type(constant) or leaf != constant):
                raise InputError(f"{name}: got {leaf!r}, the graph was captured with {constant!r}; {_ADVICE}")
            if leaf_name is not None and not isinstance(leaf, torch.Tensor):
                raise InputError(f"{name}: got {type(leaf).__name__}, the graph was captured with a tensor; {_ADVICE}")
        return {n: leaf for (n, _), leaf in zip(self.leaves, leaves, strict=True) if n is not None}


_ADVICE = "pass what you will call it with as example inputs."


@dataclass(frozen=True, eq=False)
class Signature:
    """How a model is called.

    Attributes:
        parameters: of the model's forward.
        given: the arguments of the example: the name of a parameter, or a position or keyword that a variadic one took.
        args: the positional arguments of the example, in order; the others are passed by keyword.
        optional: arguments that hold tensors, and that calls may leave out.
    """

    parameters: inspect.Signature
    given: Mapping[str, _Given]
    args: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Signature":
        return self

    @staticmethod
    def of(model: nn.Module, example_inputs: Any) -> tuple["Signature", tuple[torch.Tensor, ...]]:
        """The signature of a model called with example inputs, and the tensors among them.

        Raises:
            InputError: the model does not take these arguments, there is no tensor among them, or tensors lie on several devices.
        """
        inputs = Inputs.of(example_inputs)
        if not any(isinstance(leaf, torch.Tensor) for leaf in Structure.of((inputs.args, inputs.kwargs))[0]):
            got = ", ".join(type(value).__name__ for value in (*inputs.args, *inputs.kwargs.values())) or "nothing"
            raise InputError(
                f"example_inputs: got {got}, wanted tensors; "
                "pass what the model is called with, for example (torch.randn(2, 3, 224, 224),)."
            )
        parameters = _plain_signature(model.forward)
        bound = _bind(parameters, inputs.args, inputs.kwargs)
        given: dict[str, _Given] = {}
        tensors: dict[str, torch.Tensor] = {}
        for name, value in _named_arguments(parameters, bound):
            leaves, structure = Structure.of(value)
            named = list(zip(_name_leaves(name, value, tensors), leaves, strict=True))
            tensors |= {n: leaf for n, leaf in named if n is not None}
            given[name] = _Given(structure, tuple((n, None if n is not None else leaf) for n, leaf in named))
        _check_devices(model, tensors.values())
        count = len(inputs.args)
        return Signature(parameters, given, tuple(list(given)[:count])), tuple(tensors.values())

    @property
    def droppable(self) -> tuple[str, ...]:
        """The arguments that are one tensor each and have a default."""
        parameters = self.parameters.parameters
        return tuple(
            name
            for name, given in self.given.items()
            if name in parameters and parameters[name].default is None and given.names == (name,)
        )

    def drop(self, name: str) -> "Signature":
        """The signature of the calls that leave an argument out."""
        given = {other: value for other, value in self.given.items() if other != name}
        if name in self.args:  # those behind it are then passed by keyword
            return replace(self, given=given, args=self.args[: self.args.index(name)])
        return replace(self, given=given)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors, in order."""
        return tuple(name for given in self.given.values() for name in given.names)

    def arguments(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the example with `leaves` in the place of its tensors."""
        tensors = dict(zip(self.names, leaves, strict=True))
        values = {name: given.build(tensors) for name, given in self.given.items()}
        return tuple(values.pop(name) for name in self.args), values

    def leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The tensors of a call, in order; None for an optional argument that it leaves out.

        Raises:
            InputError: the call differs from the example in more than its tensors.
        """
        bound = dict(_named_arguments(self.parameters, _bind(self.parameters, args, kwargs)))
        tensors: dict[str, Any] = {}
        for name, given in self.given.items():
            if name in bound and not (bound[name] is None and given.names):
                tensors |= given.tensors(name, bound.pop(name))
            elif name in self.optional:
                tensors |= dict.fromkeys(given.names)
                bound.pop(name, None)
            elif given.names:
                raise InputError(
                    f"{name}: is missing; the graph was captured with {', '.join(self.given)}. To leave it out, {_ADVICE}"
                )
        for name, value in bound.items():
            parameter = self.parameters.parameters.get(name)
            if parameter is None or not _is_default(parameter, value):
                raise InputError(self._unknown(name))
        return tuple(tensors[name] for name in self.names)

    def example_leaves(self, example_inputs: Any) -> tuple[Any, ...]:
        """The tensors of other example inputs."""
        inputs = Inputs.of(example_inputs)
        leaves = self.leaves(inputs.args, inputs.kwargs)
        if any(leaf is None for leaf in leaves):  # an optional argument
            name = next(name for name, leaf in zip(self.names, leaves, strict=True) if leaf is None)
            raise InputError(self._missing(name))
        return leaves

    @property
    def takes_tensors_alone(self) -> bool:
        """Whether each parameter is one tensor of the example, which no call can leave out."""
        parameters = self.parameters.parameters
        return all(given.names == (name,) for name, given in self.given.items()) and all(
            name in self.given and p.default is p.empty for name, p in parameters.items()
        )

    @property
    def takes_whole_arguments(self) -> bool:
        """Whether each argument of the example is a tensor or a constant, and none went to a variadic parameter."""
        return all(
            name in self.parameters.parameters and given.names in ((), (name,)) and given.structure.spec.is_leaf()
            for name, given in self.given.items()
        )

    def check(self, name: str, value: Any) -> None:
        """Raise `InputError` unless the value of an argument is one that the graph was captured for."""
        given = self.given.get(name)
        if given is None:
            if not _is_default(self.parameters.parameters[name], value):
                raise InputError(self._unknown(name))
        elif value is None and given.names:
            if name not in self.optional:
                raise InputError(self._missing(name))
        else:
            given.tensors(name, value)

    def refuse(self, arguments: Sequence[Any] | Mapping[str, Any]) -> None:
        """Raise `InputError` if there are any further arguments."""
        if arguments:
            raise InputError(self._unknown(", ".join(map(str, arguments))))

    def _unknown(self, name: str) -> str:
        return f"{name}: the graph was captured with {', '.join(self.given)} alone; to give it, {_ADVICE}"

    def _missing(self, name: str) -> str:
        return f"{name}: is missing; the graph was captured with {', '.join(self.given)}. To leave it out, {_ADVICE}"


def _plain_signature(forward: Callable[..., Any]) -> inspect.Signature:
    """The parameters of a forward, without annotations, which need not pickle."""
    signature = inspect.signature(forward)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return signature.replace(parameters=parameters, return_annotation=signature.empty)


def _bind(parameters: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    try:
        return parameters.bind(*args, **kwargs)
    except TypeError as error:
        if missing := _missing(parameters, args, kwargs):
            raise InputError(f"the model's forward also needs {', '.join(missing)}; give an example input for each.") from None
        raise InputError(f"the model's forward takes {parameters}, got other example inputs ({error}).") from None


def _missing(parameters: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """The parameters without a default that a call gives nothing for."""
    try:
        given = parameters.bind_partial(*args, **kwargs).arguments
    except TypeError:
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [name for name, p in parameters.parameters.items() if p.default is p.empty and p.kind not in variadic]
    return [name for name in needed if name not in given]


def _named_arguments(parameters: inspect.Signature, bound: inspect.BoundArguments) -> Iterator[tuple[str, Any]]:
    """The arguments of a call one by one, those of variadic parameters too."""
    for name, value in bound.arguments.items():
        kind = parameters.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            yield from ((f"{name}_{index}", item) for index, item in enumerate(value))
        elif kind is inspect.Parameter.VAR_KEYWORD:
            yield from value.items()
        else:
            yield name, value


def _leaf_keys(value: Any) -> list[str]:
    """For each leaf of a value the keys, fields and indices that lead to it, joined by underscores."""
    try:
        found, _ = tree_flatten_with_path(value)
    except ValueError:  # a container that does not tell its keys
        found = [((SequenceKey(index),), leaf) for index, leaf in enumerate(tree_leaves(value))]
    keys = []
    for path, leaf in found:
        own = "".join(f"_{getattr(key, 'idx', getattr(key, 'key', getattr(key, 'name', '')))}" for key in path)
        fields = _fields(leaf)
        keys += [own] if fields is None else [own + inner for inner in _leaf_keys(fields)]
    return keys


def _fields(leaf: Any) -> dict[str, Any] | None:
    """The fields of a dataclass, which no pytree knows; None for any other leaf."""
    if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
        return None
    return {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}


def _name_leaves(name: str, value: Any, taken: Container[str]) -> list[str | None]:
    """For each leaf of an argument a name of its own, a Python identifier, or None where it is a constant."""
    names: list[str | None] = []
    for keys, leaf in zip(_leaf_keys(value), Structure.of(value)[0], strict=True):
        if not isinstance(leaf, torch.Tensor):
            names.append(None)
            continue
        found = re.sub(r"\W", "_", name + keys)
        if not found.isidentifier():
            found = f"_{found}"
        while keyword.iskeyword(found) or found in taken or found in names:
            found += "_"
        names.append(found)
    return names


def _is_default(parameter: inspect.Parameter, value: Any) -> bool:
    """Whether a value is a parameter's default; one that is not compared by value must be the same object."""
    default = parameter.default
    return value is default or (type(value) is type(default) and isinstance(value, bool | int | float | str) and value == default)


def _check_devices(model: nn.Module, tensors: Iterable[torch.Tensor]) -> None:
    devices = {t.device.type for t in [*tensors, *model.parameters(), *model.buffers()]} - {"meta"}
    if len(devices) > 1:
        raise InputError(
            f"model and inputs lie on several devices: {', '.join(sorted(devices))}; move the model and its inputs to one."
        )
