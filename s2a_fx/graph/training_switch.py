"""A function whose constants depend on whether the module trains: `dropout_p` of an attention, `training` of a dropout.

before  y = f(x, p=0.1)                    the mode of tracing is baked in
after   y = TrainingSwitch(f)(x, p=0.1)    p = 0.1 in train mode, p = 0.0 in eval mode
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn


class Difference(NamedTuple):
    """One argument (its position or keyword) with its value in either mode."""

    argument: int | str
    train: Any
    eval: Any


class TrainingSwitch(nn.Module):
    """Call `function` with the constants of the present mode.

    Args:
        function: what to call.
        differences: the arguments that the mode decides; all others pass through unchanged.
    """

    def __init__(self, function: Callable[..., Any], differences: tuple[Difference, ...]) -> None:
        super().__init__()
        self.function = function
        self.differences = differences

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._called(self.training, args, kwargs)

    def inference_form(self, *args: Any, **kwargs: Any) -> Any:
        return self._called(False, args, kwargs)

    def _called(self, training: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = list(args)
        for key, train, eval_ in self.differences:
            value = train if training else eval_
            if isinstance(key, int):
                arguments[key] = value
            else:
                kwargs = {**kwargs, key: value}
        return self.function(*arguments, **kwargs)

    def extra_repr(self) -> str:
        changes = ", ".join(f"{d.argument}: {d.train} / {d.eval}" for d in self.differences)
        return f"{getattr(self.function, '__name__', self.function)}, train / eval {changes}"
