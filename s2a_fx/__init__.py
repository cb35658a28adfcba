"""s2a_fx: fine-tune vision models in less memory.

    report = s2a_fx.analyze(model, (x,))                    what a training step keeps and peaks at, before it runs
    gm = s2a_fx.transform(model, (x,), recipe="s2a")        an ordinary trainable module that keeps less
    s2a_fx.save_adapter(gm, "task.safetensors")             what was trained, apart from its base
    print(s2a_fx.compare(model, (x,), ["full", "s2a"]).table())

Passes are in `s2a_fx.passes`, analyses in `s2a_fx.analysis`, recipes in `s2a_fx.RECIPES`.
"""

from s2a_fx.analyze import analyze, compare
from s2a_fx.errors import AdapterError, InputError, PassError, S2AError, ShapeError, TraceError
from s2a_fx.finalize import finalize
from s2a_fx.graph.calls import Call, find_calls
from s2a_fx.graph.capture import trace
from s2a_fx.graph.inputs import Inputs
from s2a_fx.recipes import RECIPES
from s2a_fx.report import Comparison, MemoryReport
from s2a_fx.tasks.adapter import TaskAdapter, load_adapter, read_adapter, save_adapter
from s2a_fx.transform import transform
from s2a_fx.version import __version__

__all__ = [
    "RECIPES",
    "AdapterError",
    "Call",
    "Comparison",
    "InputError",
    "Inputs",
    "MemoryReport",
    "PassError",
    "S2AError",
    "ShapeError",
    "TaskAdapter",
    "TraceError",
    "__version__",
    "analyze",
    "compare",
    "finalize",
    "find_calls",
    "load_adapter",
    "read_adapter",
    "save_adapter",
    "trace",
    "transform",
]
