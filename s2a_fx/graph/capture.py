"""Turn an `nn.Module` into a `torch.fx.GraphModule` that does what the module does.

The graph

1. shares the storages of the model's weights but owns its modules and `nn.Parameter`s, so that freezing, adding and replacing
   in the graph never shows in the model it came from;
2. switches with `.train()` and `.eval()` as the model does: it is captured in both modes, which are aligned;
3. keeps the batch symbolic: sizes that the model reads from its input stay nodes; of a model that counts its images, it is for one
   batch size, and raises `ShapeError` for others (see `fixed_batch.py`);
4. carries `node.meta["val"]` (fake tensors) and `node.meta["nn_module_stack"]` (provenance) on every node;
5. is faithful: on fake inputs, in both modes, it makes the same ATen calls as the model (see `fidelity.py`).

torch.fx captures first; what it cannot follow, or follows unfaithfully, Dynamo captures.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from s2a_fx.errors import InputError, S2AError, TraceError
from s2a_fx.graph import fidelity, torch_internals
from s2a_fx.graph.assignments import replace_assignments
from s2a_fx.graph.caches import without_caches
from s2a_fx.graph.call_code import CallCode, Result
from s2a_fx.graph.dynamo_capture import capture_by_dynamo
from s2a_fx.graph.fake import fake_copy, fake_mode, fake_modules, fake_tensor, traced_inputs
from s2a_fx.graph.fidelity import Behaviour
from s2a_fx.graph.fixed_batch import fix_batch
from s2a_fx.graph.flow import eliminate_dead_code
from s2a_fx.graph.foreign_random_numbers import run_refusing_draws
from s2a_fx.graph.fx_capture import THROUGH, Captured, capture_by_fx
from s2a_fx.graph.given_model import accept_model
from s2a_fx.graph.inputs import Signature, Structure
from s2a_fx.graph.lasting_state import run_refusing_lasting_state, state_restored
from s2a_fx.graph.metadata import add_note, signature_of, start_record
from s2a_fx.graph.model_attributes import Skeleton, free_names, match_state, switch_mode
from s2a_fx.graph.model_code import first_line, place_of_error
from s2a_fx.graph.modes import align_modes
from s2a_fx.graph.optional import FlatCapture, absent_results, dependents_of, make_optional
from s2a_fx.graph.regions import ModeRegion
from s2a_fx.graph.scopes import close_scopes
from s2a_fx.graph.shapes import propagate
from s2a_fx.graph.torch_internals import FakeTensorMode, tree_leaves, tree_map_only
from s2a_fx.graph.traced_module import TracedModule
from s2a_fx.graph.training_switch import TrainingSwitch

_MODES = (True, False)
_Run = Callable[[], tuple[list[Any], Structure]]
Capture = Callable[[nn.Module, Signature, Sequence[torch.Tensor]], Captured]


def trace(model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    """Trace `model` into a graph with shapes and provenance.

    Args:
        model: any module, its weights real, fake or on the `meta` device. A graph module made by s2a_fx keeps its graph.
        example_inputs: what `model` is called with: a tensor, a tuple of positional arguments, a dict of keyword arguments, or
            `s2a_fx.Inputs(*args, **kwargs)`. Arguments are pytrees of tensors, real, fake or meta, and of constants. Of tensors
            only shapes, dtypes and devices are read; constants become part of the graph.

    Returns:
        A graph module that is called and answers as `model` does, shares the storages of its weights, and owns all else.

    Raises:
        InputError: the inputs do not fit the model.
        TraceError: neither torch.fx nor Dynamo can follow the model faithfully, or it does what no graph can: draws with Python's
            random, keeps state outside of its buffers, waits for gradients with hooks; names the module and the line.
    """
    model = accept_model(model)
    with torch_internals.neutral_state(), torch_internals.without_autocast(), without_caches(model):
        owned = share_weights(model)
        signature = signature_of(owned)
        if signature is None:
            _refuse_gradient_hooks(model)
            signature, inputs = Signature.of(owned, example_inputs)
            renamed = free_names(owned)
            return _capture(_Example(owned, signature, inputs, renamed, Skeleton.of(owned)))
        gm: fx.GraphModule = owned  # type: ignore[assignment]
        inputs = signature.example_leaves(example_inputs)
        if _knows_shapes(gm) and all(_is_same_kind(t, v) for t, v in zip(inputs, traced_inputs(gm), strict=True)):
            return gm
        try:
            propagate(gm, inputs)
        except Exception as error:
            raise _refusal_of_inputs(model, inputs, error) from error
    return gm


def _refuse_gradient_hooks(model: nn.Module) -> None:
    """Raise if hooks wait for the gradients of a model's parameters: a graph has parameters of its own."""
    for name, parameter in model.named_parameters():
        if torch_internals.has_gradient_hooks(parameter):
            raise TraceError(f"{name}: has a hook on its gradient, and the graph has parameters of its own; register it on those.")


def _knows_shapes(gm: fx.GraphModule) -> bool:
    """Whether nodes have values: those of an unpickled graph have none."""
    return all("val" in node.meta for node in gm.graph.nodes)


def _refusal_of_inputs(model: nn.Module, inputs: Sequence[torch.Tensor], error: Exception) -> InputError:
    shapes = ", ".join(str(tuple(t.shape)) for t in inputs)
    advice = "Pass inputs of the size that the model was built for."
    if "more than 1 value per channel" in str(error):  # a norm over the batch, of one image whose map is one position
        advice = "Pass a larger batch or larger images."
    return InputError(f"{type(model).__name__} does not take inputs of shape {shapes}: {first_line(error)}. {advice}")


def _is_same_kind(given: torch.Tensor, traced: torch.Tensor) -> bool:
    return (given.shape, given.dtype, given.requires_grad) == (traced.shape, traced.dtype, traced.requires_grad)


def share_weights(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same storages: new `nn.Parameter`s over the old data, the same buffers."""
    memo: dict[int, Any] = {id(b): b for b in model.buffers()}
    memo |= {id(t): t.detach() for t in torch_internals.normalized_weights(model)}
    for parameter in model.parameters():
        own = memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        vars(own).update((name, value) for name, value in vars(parameter).items() if isinstance(value, int | float | str))
    try:
        return copy.deepcopy(model, memo)
    except RuntimeError as error:
        raise InputError(
            f"{type(model).__name__} holds tensors that cannot be copied ({first_line(error)}). Keep no tensor that needs a "
            "gradient in an attribute of a module: detach it, or make it an nn.Parameter or a buffer."
        ) from error


@dataclass(frozen=True)
class _Example:
    """A model, a private copy, how it is called, the names that `free_names` gave to its parts, and what callers read of it."""

    model: nn.Module
    signature: Signature
    inputs: tuple[torch.Tensor, ...]
    renamed: Mapping[str, str]
    skeleton: Skeleton

    def drop(self, name: str) -> "_Example":
        """The same model, copied, called without an argument."""
        inputs = tuple(t for leaf, t in zip(self.signature.names, self.inputs, strict=True) if leaf != name)
        return replace(self, model=share_weights(self.model), signature=self.signature.drop(name), inputs=inputs)


def _capture(example: _Example) -> TracedModule:
    """A faithful graph: by torch.fx, or else by Dynamo."""
    wanted = _behaviours_of_model(example)
    refusals: list[TraceError] = []
    single = example.inputs and example.inputs[0].ndim and len(example.inputs[0]) == 1
    for capture in (_by_fx, _by_dynamo_of_two, capture_by_dynamo) if single else (_by_fx, capture_by_dynamo):
        others = {name: example.drop(name) for name in example.signature.droppable}
        try:
            graph, result, other_sizes = _flat_graph(example, capture)
            gm = _build(example, *_with_optional(example, others, capture, graph, result))
            _check_fidelity(example, gm, result, wanted)
            if not all(_takes_batch(example, gm, result, *pair) for pair in itertools.product(other_sizes, _MODES)):
                fix_batch(gm, len(example.inputs[0]))
                add_note(gm, "trace", "", f"is for batches of {len(example.inputs[0])}: the model computes with their number")
            replace_assignments(gm)
            propagate(gm)
        except TraceError as refusal:
            refusals.append(refusal)
        except S2AError:
            raise
        except Exception as error:  # a forward is anybody's code
            refusals.append(TraceError(f"{place_of_error(example.model, '', error)}: {type(error).__name__}: {first_line(error)}"))
            refusals[-1].__cause__ = error
        else:
            return gm
    by_fx, by_dynamo = (str(refusal).rstrip(".") for refusal in (refusals[0], refusals[-1]))
    raise TraceError(
        f"{by_fx}; and Dynamo: {by_dynamo}. Rewrite that line without control flow on tensors, or mark its module with "
        "timm.layers.register_notrace_module so that it stays one opaque node."
    ) from refusals[-1]


def _by_fx(model: nn.Module, signature: Signature, inputs: Sequence[torch.Tensor]) -> Captured:
    return capture_by_fx(model, signature)


def _by_dynamo_of_two(model: nn.Module, signature: Signature, inputs: Sequence[torch.Tensor]) -> Captured:
    """Dynamo makes a number of a single image, and a size of two."""
    mode = fake_mode()
    return capture_by_dynamo(model, signature, [fake_tensor(t, mode, 2 if t.ndim and len(t) == 1 else None) for t in inputs])


def _flat_graph(example: _Example, capture: Capture) -> tuple[fx.Graph, Result, tuple[int, ...]]:
    """The flat graph of both modes, the structure of what it returns, and doubtful batch sizes; the model stays in its mode."""
    model = example.model
    modes = [(module, module.training) for module in model.modules()]
    try:
        train, evaluation = (capture(model.train(mode), example.signature, example.inputs) for mode in _MODES)
    finally:
        for module, training in modes:
            module.training = training
    result = Result(train.structure, evaluation.structure)
    return align_modes(model, train.graph, evaluation.graph), result, tuple({*train.other_sizes, *evaluation.other_sizes})


def _with_optional(
    example: _Example, others: Mapping[str, _Example], capture: Capture, graph: fx.Graph, result: Result
) -> tuple[fx.Graph, Result, tuple[str, ...]]:
    """The graph, its result and the names of the arguments that calls may leave out."""
    full = FlatCapture(example.model, graph)
    arguments: dict[tuple[fx.Node, ...], list[str]] = {}  # what depends on arguments -> their names
    without = {}
    for name, other in others.items():
        try:
            smaller, smaller_result, _ = _flat_graph(other, capture)
        except (TraceError, InputError):
            continue  # the model itself needs the argument
        found = dependents_of(full, FlatCapture(other.model, smaller), name)
        if found is None or any(set(found) & set(nodes) for nodes in arguments if nodes != tuple(found)):
            continue
        arguments.setdefault(tuple(found), []).append(name)
        absent = absent_results(graph, found)
        if absent and smaller_result.train != result.train:  # else None stands for what is absent
            without[absent] = smaller_result.train, smaller_result.eval
    for nodes, names in arguments.items():
        make_optional(full, names, nodes)
    return graph, replace(result, without=without), tuple(name for names in arguments.values() for name in names)


def _build(example: _Example, graph: fx.Graph, result: Result, optional: tuple[str, ...]) -> TracedModule:
    """The graph module that is called as the model is."""
    signature = replace(example.signature, optional=optional)
    if result.is_plain:
        output: Any = graph.output_node()
        output.args = (result.build(output.args[0]),)
    graph.set_codegen(CallCode(signature, result))
    gm = TracedModule(example.model, graph, type(example.model).__name__)
    match_state(gm, example.model, example.renamed)
    start_record(gm, example.skeleton, signature)
    close_scopes(gm)
    eliminate_dead_code(gm)
    gm.graph.lint()
    gm.recompile()
    return gm


def _check_fidelity(example: _Example, gm: fx.GraphModule, result: Result, wanted: Mapping[bool, Behaviour]) -> None:
    """Raise `TraceError` unless the graph does what the model does in train mode and in eval mode; nodes get their values."""
    mode = fake_mode()
    fakes = fake_modules(gm, mode)
    present = example.model.training
    checked = [present] if _is_alike(gm, wanted) else sorted(wanted, key=lambda training: training != present)
    for training in checked:
        inputs = [fake_tensor(t, mode) for t in example.inputs]
        interpreter = _Recording if training == present else fx.Interpreter
        switch_mode(fakes, example.skeleton, training)
        run = _graph_run(interpreter(fakes, graph=gm.graph), inputs, result.train if training else result.eval)
        name = "train" if training else "eval"
        try:
            with mode:
                behaviour = fidelity.behaviour_of(fakes, inputs, run)
        except Exception as error:  # the model catches an error, say, or reads what no graph holds
            raise TraceError(f"the model itself: in {name} mode the graph fails ({first_line(error)})") from error
        if (differs := fidelity.difference(wanted[training], behaviour)) is not None:
            text, index = differs
            place = None if index is None else _place_of_call(example, training, index)
            raise TraceError(f"{place or 'the model itself'}: in {name} mode {text}")


def _takes_batch(example: _Example, gm: fx.GraphModule, result: Result, size: int, training: bool) -> bool:
    """Whether a graph does in one mode with batches of `size` what the model does, if that takes them.

    torch.fx keeps sizes as nodes, or refuses; Dynamo takes them for numbers where the model does.
    """
    mode, traced = fake_mode(), len(example.inputs[0])
    inputs = [fake_tensor(t, mode, size if t.ndim and len(t) == traced else None) for t in example.inputs]
    model, graph = _faked(example.model, mode).train(training), fake_modules(gm, mode)
    switch_mode(graph, example.skeleton, training)
    of_graph = _graph_run(fx.Interpreter(graph, graph=gm.graph), inputs, result.train if training else result.eval)
    with mode, _without_fast_path(example.model):
        try:
            wanted = fidelity.behaviour_of(model, inputs, _model_run(model, example.signature, inputs))
        except Exception:  # of another kind for each model
            return True
        try:
            return fidelity.difference(wanted, fidelity.behaviour_of(graph, inputs, of_graph)) is None
        except Exception:  # shapes do not fit each other
            return False


def _is_alike(gm: fx.GraphModule, wanted: Mapping[bool, Behaviour]) -> bool:
    """Whether the model does the same in both modes, and so does the graph, which calls the model's own modules and no switch."""
    if len(wanted) < 2 or fidelity.difference(wanted[True], wanted[False]) is not None:
        return False
    return not any(isinstance(module, TrainingSwitch | ModeRegion) for module in gm.modules())


class _Recording(fx.Interpreter):
    """Runs a graph and writes `node.meta["val"]`."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        leaf = n.op in ("placeholder", "get_attr")
        n.meta["val"] = value if leaf else tree_map_only(torch.Tensor, torch_internals.shadow_of, value)
        return value


def _graph_run(interpreter: fx.Interpreter, inputs: Sequence[torch.Tensor], structure: Structure) -> _Run:
    """A function that runs a graph on fake inputs, and returns the leaves and structure of the result."""
    interpreter.extra_traceback = False

    def run() -> tuple[list[Any], Structure]:
        output = interpreter.run(*inputs, enable_io_processing=False)
        return tree_leaves(output)[: structure.count], structure

    return run


def _behaviours_of_model(example: _Example) -> dict[bool, Behaviour]:
    """What the model does in train mode and in eval mode; a mode in which it is not, and that refuses the inputs, is left out."""
    model, mode = example.model, fake_mode()
    fakes = _faked(model, mode)
    found: dict[bool, Behaviour] = {}
    for training in _MODES:
        inputs = [fake_tensor(t, mode) for t in example.inputs]
        try:
            with mode, _without_fast_path(model), state_restored(fakes):
                run = _model_run(fakes.train(training), example.signature, inputs)
                observed = functools.partial(fidelity.behaviour_of, fakes, inputs, run)
                found[training] = run_refusing_lasting_state(fakes, functools.partial(run_refusing_draws, fakes, observed))
        except torch_internals.READS_VALUE as error:
            raise _refusal_of_reading(example, error) from error
        except TraceError:
            raise
        except Exception as error:
            if training == model.training:
                raise _refusal_of_inputs(model, example.inputs, error) from error
    return found


def _faked(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of a model with fake parameters and buffers; tensors that are plain attributes stay."""
    memo: dict[int, Any] = {id(t): t for t in torch_internals.plain_tensors(model)}
    memo |= {id(t): fake_tensor(t, mode) for t in [*model.parameters(), *model.buffers()]}
    return fake_copy(model, memo)


def _model_run(fakes: nn.Module, signature: Signature, inputs: Sequence[torch.Tensor]) -> _Run:
    """A function that calls a fake model on fake inputs, and returns the leaves and structure of the result."""
    args, kwargs = signature.arguments(inputs)
    return lambda: Structure.of(fakes(*args, **kwargs))


def _refusal_of_reading(example: _Example, error: Exception) -> TraceError:
    """Tells which module reads the value of a tensor."""
    try:
        capture_by_fx(example.model, example.signature)
    except TraceError as refusal:
        place = str(refusal)
    else:
        place = f"{place_of_error(example.model, '', error)}: reads the value of a tensor"
    return TraceError(
        f"{place}. A graph cannot branch on values, or read them as numbers: rewrite that line with torch.where or the like, or "
        "mark its module with timm.layers.register_notrace_module so that it stays one opaque node."
    )


def _place_of_call(example: _Example, training: bool, index: int) -> str | None:
    """The line of the model that makes a call, by its number in the model's behaviour."""
    mode = fake_mode()
    fakes = _faked(example.model, mode).train(training)
    inputs = [fake_tensor(t, mode) for t in example.inputs]
    with mode, _without_fast_path(example.model), suppress(Exception):  # what runs once need not run twice
        return fidelity.place_of_call(fakes, inputs, _model_run(fakes, example.signature, inputs), index)
    return None


class _PassThrough(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return func(*args, **(kwargs or {}))


def _without_fast_path(model: nn.Module) -> Any:
    """Keep torch's attention modules off the fused path of inference, which no graph takes: a function mode does."""
    through = tuple(kind for kind in THROUGH if kind is not nn.Sequential)
    return _PassThrough() if any(isinstance(module, through) for module in model.modules()) else nullcontext()
