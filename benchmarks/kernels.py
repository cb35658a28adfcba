"""Operators that keep codes against the plain ones: forward and backward time, and bytes touched against a copy's bandwidth.

    python benchmarks/kernels.py [--device cuda] [--dtype bfloat16] [--batch-size 8] [--cases gelu attention]

Shapes are ViT-B/16's unless said; weights are frozen, biases train. The plain and the coded operator take turns; times are medians.
Bytes touched are those that no implementation could do without: forward, inputs read, output and codes written; backward, the
output's gradient and what was saved read, the inputs' gradients written. Their rate is given as a share of the rate of a large copy
on the same device in the same run: 1.00 is a kernel that does nothing but move them once. (Attention, products and convolutions
also compute: they stay below.)
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import record
import torch
import torch.nn.functional as F
from tabulate import tabulate

from s2a_fx import ops
from s2a_fx.ops.activation import binned, masked
from s2a_fx.ops.frozen_convolution import frozen_convolution
from s2a_fx.ops.layer_norm import layer_norm

Tensors = tuple[torch.Tensor, ...]
Make = Callable[..., torch.Tensor]  # sizes -> a random tensor of that shape on the device
CALLS = {"cpu": 1, "cuda": 10}
"""Calls that are timed together: on CUDA enough to hide the launch of one behind the work of another."""
COPIED = {"cpu": 2**26, "cuda": 2**29}
HEADS, TOKENS, HEAD, WIDTH = 12, 197, 64, 768


@dataclass(frozen=True)
class Case:
    """An operator: the plain form, the form that keeps codes, and what both are called with (batch size, maker of tensors)."""

    name: str
    plain: Callable[..., torch.Tensor]
    coded: Callable[..., torch.Tensor]
    make_inputs: Callable[[int, Make], Tensors]


@dataclass(frozen=True)
class Row:
    """Medians in seconds and bytes touched of one form of one operator; backward is None for forms without one."""

    case: str
    form: str
    saved_bytes: int
    forward_bytes: int
    backward_bytes: int
    forward_seconds: float
    backward_seconds: float | None


def _hidden(batch: int, make: Make) -> Tensors:
    return (make(batch, TOKENS, 4 * WIDTH),)


def _scores(batch: int, make: Make) -> Tensors:
    return (make(batch, HEADS, TOKENS, TOKENS),)


def _scores_and_value(batch: int, make: Make) -> Tensors:
    return make(batch, HEADS, TOKENS, TOKENS), make(batch, HEADS, TOKENS, HEAD)


def _query_key_value(batch: int, make: Make) -> Tensors:
    return tuple(make(batch, HEADS, TOKENS, HEAD) for _ in range(3))


def _norm(batch: int, make: Make) -> Tensors:
    return make(batch, TOKENS, WIDTH), make(WIDTH).detach(), make(WIDTH)


def _depthwise(batch: int, make: Make) -> Tensors:
    """Of ConvNeXt-B's third stage."""
    return make(batch, 512, 14, 14), make(512, 1, 7, 7).detach(), make(512)


CASES = (
    Case("binned", F.gelu, lambda x: binned(x, "gelu", 4)[0], _hidden),
    Case("masked", F.relu, lambda x: masked(x, "relu", [])[0], _hidden),
    Case(
        "layer_norm",
        lambda x, w, b: F.layer_norm(x, (WIDTH,), w, b),
        lambda x, w, b: layer_norm(x, w, b, 1e-5, True, 4)[0],
        _norm,
    ),
    Case(
        "frozen_convolution",
        lambda x, w, b: F.conv2d(x, w, b, padding=3, groups=512),
        lambda x, w, b: frozen_convolution(x, w, b, [1, 1], [3, 3], [1, 1], 512),
        _depthwise,
    ),
    Case("gelu", F.gelu, lambda x: ops.gelu(x, "none", 4)[0], _hidden),
    Case("silu", F.silu, lambda x: ops.silu(x, 4)[0], _hidden),
    Case("relu", F.relu, lambda x: ops.relu(x)[0], _hidden),
    Case("softmax", lambda x: x.softmax(-1), lambda x: ops.softmax(x, -1, 4)[0], _scores),
    Case("softmax_matmul", lambda x, v: x.softmax(-1) @ v, lambda x, v: ops.softmax_matmul(x, v, 0.0, 4)[0], _scores_and_value),
    Case(
        "attention",
        F.scaled_dot_product_attention,
        lambda q, k, v: ops.attention(q, k, v, None, 0.0, False, HEAD**-0.5, 4)[0],
        _query_key_value,
    ),
)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.ones(COPIED[device], device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * _bytes(source) / statistics.median(seconds[1:])


def touched(form: Callable[..., torch.Tensor], inputs: Tensors) -> tuple[int, int, int]:
    """Bytes that `form` keeps, and that its forward and its backward cannot but touch."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = form(*inputs)
    standing = {t.untyped_storage().data_ptr() for t in (*inputs, out)}
    written = _bytes(out) + sum(size for pointer, size in kept.items() if pointer not in standing)
    gradients = sum(_bytes(t) for t in inputs if t.requires_grad)
    return sum(kept.values()), sum(map(_bytes, inputs)) + written, _bytes(out) + sum(kept.values()) + gradients


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def time_once(form: Callable[..., torch.Tensor], inputs: Tensors, device: str) -> tuple[float, float | None]:
    """Seconds of one forward and one backward."""
    calls = CALLS[device]
    trained = [t for t in inputs if t.requires_grad]
    synchronize(device)
    start = time.perf_counter()
    outs = [form(*inputs) for _ in range(calls)]
    synchronize(device)
    forward = (time.perf_counter() - start) / calls
    if not outs[0].requires_grad:
        return forward, None
    gradients = [torch.ones_like(out) for out in outs]
    synchronize(device)
    start = time.perf_counter()
    while outs:
        torch.autograd.grad(outs.pop(), trained, gradients.pop())
    synchronize(device)
    return forward, (time.perf_counter() - start) / calls


def rows_of(case: Case, batch_size: int, device: str, dtype: torch.dtype, runs: int) -> list[Row]:
    torch.manual_seed(0)
    inputs = case.make_inputs(batch_size, lambda *size: torch.randn(*size, device=device, dtype=dtype, requires_grad=True))
    forms = {"plain": case.plain, "coded": case.coded}
    times: dict[str, list[tuple[float, float | None]]] = {name: [] for name in forms}
    for turn in range(runs + 1):
        for name, form in forms.items():
            taken = time_once(form, inputs, device)
            if turn:  # the first compiles and warms up
                times[name].append(taken)
    rows = []
    for name, form in forms.items():
        backward = [b for _, b in times[name] if b is not None]
        forward = statistics.median(f for f, _ in times[name])
        rows.append(Row(case.name, name, *touched(form, inputs), forward, statistics.median(backward) if backward else None))
    return rows


def table(rows: list[Row], bandwidth: float) -> str:
    lines = []
    for plain, coded in zip(rows[::2], rows[1::2], strict=True):
        for row in (plain, coded):
            back, plain_back = row.backward_seconds, plain.backward_seconds
            lines.append(
                {
                    "operator": row.case,
                    "form": row.form,
                    "saved MB": row.saved_bytes / 1e6,
                    "forward ms": row.forward_seconds * 1e3,
                    "backward ms": back and back * 1e3,
                    "forward / plain": row.forward_seconds / plain.forward_seconds,
                    "backward / plain": back / plain_back if back and plain_back else None,
                    "forward GB/s": row.forward_bytes / row.forward_seconds / 1e9,
                    "backward GB/s": back and row.backward_bytes / back / 1e9,
                    "forward / copy": row.forward_bytes / row.forward_seconds / bandwidth,
                    "backward / copy": back and row.backward_bytes / back / bandwidth,
                }
            )
    return tabulate(lines, headers="keys", floatfmt=("", "", ".1f", ".3f", ".3f", ".2f", ".2f", ",.1f", ",.1f", ".2f", ".2f"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(CALLS), default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], default=[case.name for case in CASES])
    parser.add_argument("--name", default="kernels", help="of the JSON in benchmarks/results (default: %(default)s)")
    options = parser.parse_args()
    bandwidth = copy_bandwidth(options.device)
    rows: list[Row] = []
    left_out: list[str] = []
    for case in CASES:
        if case.name not in options.cases:
            continue
        try:
            rows += rows_of(case, options.batch_size, options.device, getattr(torch, options.dtype), options.runs)
        except RuntimeError as error:  # a kernel that this device cannot compile or hold: the others still run
            left_out.append(f"{case.name}: {error}")
            print("left out:", left_out[-1], flush=True)
    processor = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{processor}, {options.dtype}, batch {options.batch_size}; a copy moves {bandwidth / 1e9:,.1f} GB/s")
    print(table(rows, bandwidth))
    missing = {operator._schema.name.partition("::")[2] for operator in ops.KERNELS} - {case.name for case in CASES}
    if missing:
        print("no case yet:", ", ".join(sorted(missing)))
    setting = {name: getattr(options, name) for name in ("device", "dtype", "batch_size", "runs")}
    figures = {
        "setting": {**setting, "processor": processor},
        "copy_bytes_a_second": bandwidth,
        "rows": [asdict(row) for row in rows],
        "left_out": left_out,
    }
    print(record.write(options.name, figures, options.device))


if __name__ == "__main__":
    main()
