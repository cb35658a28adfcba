"""The code of a graph module's `forward`: called as the model is, and answering as it does.

def forward(self, pixel_values = None, labels = None, **kwargs):
    _signature.check('pixel_values', pixel_values)
    _signature.refuse(kwargs)
    ...
    return _result.build((loss, logits), self.training)
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.fx.graph import CodeGen

from s2a_fx.graph import torch_internals
from s2a_fx.graph.inputs import Signature, Structure

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True, eq=False)
class Result:
    """The structure of what a model returns. A graph returns the leaves; a mode reads the first ones.

    Attributes:
        train, eval: in either mode.
        without: which leaves are absent without an optional argument -> the structures that hold the others in either mode. Where
            several arguments are left out that make other leaves, those are None.
    """

    train: Structure
    eval: Structure
    without: Mapping[tuple[int, ...], tuple[Structure, Structure]] = field(default_factory=dict)

    def build(self, leaves: tuple[Any, ...], training: bool = True) -> Any:
        """What the model returns, of the graph's leaves."""
        missing = {index for indices in self.without for index in indices if leaves[index] is None}
        absent = tuple(sorted(missing))
        train, evaluation = self.without.get(absent, (self.train, self.eval))
        if absent in self.without:
            leaves = tuple(leaf for index, leaf in enumerate(leaves) if index not in missing)
        structure = train if training else evaluation
        return structure.build(leaves[: structure.count])

    @property
    def is_plain(self) -> bool:
        """Whether tuples, lists and dicts hold all leaves, always alike: then the graph's output is the result itself."""
        return self.train == self.eval and self.train.is_plain and not self.without


class CallCode(CodeGen):
    """Generates a forward with the model's own parameters."""

    def __init__(self, signature: Signature, result: Result) -> None:
        super().__init__()
        self.signature, self.result = signature, result

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, *, expanded_def: bool = False) -> str:
        parameters = list(self.signature.parameters.parameters.values())
        declared = ", ".join(["self", *_declarations(parameters)])
        lines = [f"def {torch_internals.function_name(self)}({declared}){maybe_return_annotation}:"]
        if self.signature.takes_whole_arguments:
            lines += self._checks(parameters)
        else:
            names = "".join(f"{name}, " for name in self.signature.names)
            lines.append(f"{names}= _signature.leaves({_call_of(parameters)})")
        return "\n    ".join(lines)

    def _checks(self, parameters: list[inspect.Parameter]) -> list[str]:
        """A line for each parameter that a call may fill otherwise than the example did."""
        if self.signature.takes_tensors_alone:
            return []
        return [
            f"_signature.refuse({p.name})" if p.kind in _VARIADIC else f"_signature.check({p.name!r}, {p.name})" for p in parameters
        ]

    def generate_output(self, output_args: Any, **options: Any) -> str:
        if self.result.is_plain:
            return super().generate_output(output_args, **options)
        return f"return _result.build({output_args!r}, self.training)"

    def process_outputs(self, outputs: Any) -> Any:
        return outputs if self.result.is_plain else self.result.build(outputs)

    def eval_result(self, outputs: Any) -> Any:
        """What the model returns in eval mode where the graph returns `outputs`."""
        return outputs if self.result.is_plain else self.result.build(outputs, training=False)

    def additional_globals(self) -> list[tuple[str, Any]]:
        return [("_signature", self.signature), ("_result", self.result)]


def _call_of(parameters: list[inspect.Parameter]) -> str:
    """The arguments of a call as a tuple and a dict, in code."""
    positional = [f"*{p.name}" if p.kind is p.VAR_POSITIONAL else p.name for p in parameters if p.kind <= p.VAR_POSITIONAL]
    by_name = [
        f"**{p.name}" if p.kind is p.VAR_KEYWORD else f"{p.name!r}: {p.name}" for p in parameters if p.kind > p.VAR_POSITIONAL
    ]
    return f"({''.join(f'{text}, ' for text in positional)}), {{{', '.join(by_name)}}}"


def _declarations(parameters: list[inspect.Parameter]) -> list[str]:
    """The parameters as they stand in a definition."""
    texts = []
    for index, p in enumerate(parameters):
        if p.kind is p.KEYWORD_ONLY and not any(q.kind in (q.VAR_POSITIONAL, q.KEYWORD_ONLY) for q in parameters[:index]):
            texts.append("*")
        default = _default_of(p)
        stars = "*" if p.kind is p.VAR_POSITIONAL else "**" if p.kind is p.VAR_KEYWORD else ""
        texts.append(f"{stars}{p.name}{default}")
        if p.kind is p.POSITIONAL_ONLY and not any(q.kind is q.POSITIONAL_ONLY for q in parameters[index + 1 :]):
            texts.append("/")
    return texts


def _is_literal(default: Any) -> bool:
    return default is None or type(default) in (bool, int, float, str)


def _default_of(parameter: inspect.Parameter) -> str:
    """The default of a parameter, in code."""
    if parameter.default is parameter.empty:
        return ""
    if _is_literal(parameter.default):
        return f" = {parameter.default!r}"
    return f" = _signature.parameters.parameters[{parameter.name!r}].default"
