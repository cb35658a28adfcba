"""`analyze` and `compare`: from a model to memory reports, before any GPU is touched."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from s2a_fx.analysis.device import device_model
from s2a_fx.analysis.full_width import full_width_notes
from s2a_fx.analysis.ledger import StepRecord
from s2a_fx.analysis.paper import paper_bytes
from s2a_fx.analysis.peak import peak, timeline
from s2a_fx.analysis.saved import is_activation, saved_tensors
from s2a_fx.analysis.simulation import simulate
from s2a_fx.errors import InputError, PassError
from s2a_fx.fork_map import fork_map
from s2a_fx.graph.capture import trace
from s2a_fx.graph.fake import traced_inputs
from s2a_fx.graph.given_model import accept_model
from s2a_fx.graph.metadata import base_parameters, notes_of
from s2a_fx.graph.torch_internals import neutral_state
from s2a_fx.recipes import GraphPass, name_of, resolve
from s2a_fx.report import Comparison, MemoryReport, Refusal
from s2a_fx.transform import transform

Loss = Callable[[Any], torch.Tensor]
MakeOptimizer = Callable[..., torch.optim.Optimizer]

MODES = ("eager", "compile")


@neutral_state()
def analyze(
    model: nn.Module,
    example_inputs: Any,
    *,
    device: str = "cpu",
    optimizer: str | MakeOptimizer | None = "adamw",
    loss: Loss | None = None,
    name: str | None = None,
    mode: str = "eager",
) -> MemoryReport:
    """What a training step of `model`, as it is, keeps and peaks at. Nothing is run for real, nothing is allocated.

    Args:
        model: any traceable module, or the result of `transform`; its weights real, fake or on the `meta` device. What trains is
            what has `requires_grad`.
        example_inputs: what the model is called with, of the training size: see `transform`.
        device: `cpu` or `cuda`: whose kernels and allocator to assume.
        optimizer: `adamw`, `adam`, `sgd`, a function from parameters to an optimizer, or None.
        loss: from the model's output to a scalar; left out, cross-entropy for outputs of shape (batch, classes).
        name: what to call the model in the report.
        mode: `eager`, or `compile` for the step as torch.compile runs it: what AOTAutograd's partitioner saves, the compiler's
            settings (`activation_memory_budget`, say) as they stand. The peak is then an upper bound: operators count unfused.

    Raises:
        S2AError: the model cannot be traced, or an argument does not fit.
    """
    _check_mode(mode)
    gm = trace(model, example_inputs)
    return _report(gm, name or type(accept_model(model)).__name__, "as given", device, optimizer, loss, mode)


@neutral_state()
def compare(
    model: nn.Module,
    example_inputs: Any,
    recipes: Sequence[str | Sequence[GraphPass]] = ("full", "bias", "s2a"),
    *,
    device: str = "cpu",
    optimizer: str | MakeOptimizer | None = "adamw",
    loss: Loss | None = None,
    name: str | None = None,
    jobs: int = 1,
    tell_refusals: bool = False,
    modes: Sequence[str] = ("eager",),
) -> Comparison:
    """Reports of `model` under several recipes.

    Args:
        recipes: each a name or a sequence of passes.
        tell_refusals: let the comparison tell which recipes do not fit the model, and why, instead of raising a `PassError`.
        modes: `eager`, `compile` or both (see `analyze`); a compiled step is called `NAME, compiled`.
        jobs: processes to share the recipes among; they are forked, so leave 1 in a process that has used CUDA or run a backward.

    The other arguments are those of `analyze`.
    """
    recipes = [recipes] if isinstance(recipes, str) else list(recipes)
    names = [name_of(recipe) for recipe in recipes]
    if not recipes or len(set(names)) < len(names):
        raise InputError(f"recipes: got {', '.join(names) or 'none'}, wanted at least one, each once.")
    for recipe in recipes:
        resolve(recipe)  # an unknown name is told before the work begins
    device_model(device)
    modes = [modes] if isinstance(modes, str) else list(modes)
    for mode in modes:
        _check_mode(mode)
    if not modes or len(set(modes)) < len(modes):
        raise InputError(f"modes: got {', '.join(modes) or 'none'}, wanted at least one of {', '.join(MODES)}, each once.")
    gm = trace(model, example_inputs)
    called = name or type(accept_model(model)).__name__

    def report(step: tuple[str | Sequence[GraphPass], str]) -> MemoryReport | Refusal:
        recipe, mode = step
        title = name_of(recipe) if mode == "eager" else f"{name_of(recipe)}, compiled"
        try:
            return _report(transform(gm, example_inputs, recipe), called, title, device, optimizer, loss, mode)
        except PassError as error:
            if not tell_refusals:
                raise
            return Refusal(name_of(recipe), str(error))

    results = fork_map(report, [(recipe, mode) for recipe in recipes for mode in modes], jobs)
    reports = tuple(r for r in results if isinstance(r, MemoryReport))
    refusals = tuple(dict.fromkeys(r for r in results if isinstance(r, Refusal)))
    if not reports:
        raise PassError(f"no recipe fits {called}: " + " ".join(f"{r.recipe}: {r.reason}" for r in refusals))
    return Comparison(reports, refusals)


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise InputError(f"mode: got {mode!r}, wanted {' or '.join(MODES)}.")


def _report(
    gm: fx.GraphModule, name: str, recipe: str, device: str, optimizer: str | MakeOptimizer | None, loss: Loss | None, mode: str
) -> MemoryReport:
    step, record = _simulated(gm, mode, device=device_model(device), optimizer=optimizer, loss=loss)
    rows = saved_tensors(step, record)
    moments = timeline(step, record)
    parameters = list(gm.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    first = traced_inputs(gm)[0]
    return MemoryReport(
        model=name,
        recipe=recipe,
        batch_size=first.shape[0] if first.ndim else 1,
        image_size=tuple(first.shape[2:] if first.ndim == 4 else first.shape[1:]),
        dtype=", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
        optimizer=optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", "none"),
        device=device,
        parameters=sum(p.numel() for p in parameters),
        trainable_parameters=trained,
        trainable_percent=100 * trained / max(base_parameters(gm), 1),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        saved_bytes=sum(row.bytes for row in rows if is_activation(row)),
        paper_bytes=paper_bytes(gm),
        peak=peak(moments),
        timeline=moments,
        saved=rows,
        notes=(*notes_of(gm), *(full_width_notes(gm, rows) if mode == "eager" else ())),
        assumptions=record.assumptions,
    )


def _simulated(gm: fx.GraphModule, mode: str, **options: Any) -> tuple[fx.GraphModule, StepRecord]:
    """The simulated step, and the graph whose nodes it names."""
    if mode == "eager":
        return gm, simulate(gm, **options)
    from s2a_fx.analysis.compiled_step import simulate_compiled  # Inductor takes seconds to import

    return simulate_compiled(gm, **options)
