"""What is modelled of CUDA, beside sizes that an H100's allocator told."""

import pytest
import torch
from torch import nn

import s2a_fx
from s2a_fx.analysis.cuda_scratch import cuda_scratch

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("rows", "width", "measured"),
    [
        (6304, 768, 38_928_384),
        (6304, 2304, 116_785_152),
        (6304, 3072, 138_412_032),
        (1568, 4096, 52_428_800),
        (3152, 2304, 58_982_400),
        (1576, 2304, 29_491_200),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_over_rows_takes_the_measured_buffer(rows, width, measured, dtype):
    x = torch.empty(rows, width, dtype=dtype, device="meta")
    assert cuda_scratch(aten.sum.dim_IntList, (x, [0]), x.sum(0)) == measured
    assert cuda_scratch(aten.sum.dim_IntList, (x.view(8, -1, width), [0, 1], True), x.sum(0)) == measured


@pytest.mark.parametrize(
    ("shape", "dims"), [((6304, 768), [1]), ((6304, 768), None), ((1000, 768), [0]), ((1, 768), [0]), ((0, 768), [0])]
)
def test_other_sums_take_none(shape, dims):
    x = torch.empty(shape, device="meta")
    assert cuda_scratch(aten.sum.dim_IntList, (x, dims), x.sum(dims)) == 0


def test_sums_count_in_the_peak_on_cuda_alone():
    model, x = nn.Sequential(nn.Linear(64, 768), nn.GELU(), nn.Linear(768, 10)).requires_grad_(False), torch.randn(6304, 64)
    model[0].bias.requires_grad_()
    cpu, cuda = (s2a_fx.analyze(model, x, device=device, optimizer="sgd").peak for device in ("cpu", "cuda"))
    assert cuda.op == "sum"
    assert cuda.bytes > cpu.bytes


def test_a_layer_norm_s_statistics_are_float32_on_cuda():
    model, x = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 10)).bfloat16(), torch.randn(32, 16).bfloat16()
    cpu, cuda = (s2a_fx.analyze(model, x, device=device) for device in ("cpu", "cuda"))
    assert cuda.saved_bytes - cpu.saved_bytes == 2 * 32 * 2
