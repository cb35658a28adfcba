"""Attention that keeps the codes of its map: forward, gradients, bytes, parts, and what is left to the other plan."""

import pytest
import torch
import torch.nn.functional as F
from saved_bytes import Kept, cosine
from small_models import small_model
from steps import assert_near, layers
from torch import nn

import s2a_fx
from s2a_fx.analysis.measure import measure_saved_bytes
from s2a_fx.codecs.powers import Powers
from s2a_fx.codecs.rows import Rows
from s2a_fx.nn import recompute
from s2a_fx.nn.coded_attention import CodedAttention
from s2a_fx.passes import CompressActivations

SHAPE = (4, 2, 24, 16)


def heads(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(SHAPE, dtype=dtype).requires_grad_() for _ in range(3)]


def masks():
    torch.manual_seed(0)
    ragged = torch.rand(4, 1, 24, 24) > 0.3
    return {
        "none": None,
        "added": torch.randn(24, 24),
        "added to each image": torch.randn(4, 1, 24, 24),
        "boolean": torch.ones(24, 24, dtype=torch.bool).tril(),
        "boolean of each image": ragged | torch.eye(24, dtype=torch.bool),
    }


def gradients(function, operands):
    y = function(*operands)
    grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).sin()
    return y, torch.autograd.grad(y, operands, grad)


@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize("mask", masks())
def test_forward_is_equal_and_gradients_are_near(mask, images):
    mask = masks()[mask]
    operands = heads()
    expected, exact = gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, scale=0.3), operands)
    module = CodedAttention(0.3, False, 8, images)
    y, actual = gradients(lambda q, k, v: module(q, k, v, mask), operands)
    assert torch.equal(y, expected)
    assert min(map(cosine, actual, exact)) > 0.9995


def test_causal():
    operands = heads()
    _, exact = gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), operands)
    _, actual = gradients(CodedAttention(None, True, 8), operands)
    assert min(map(cosine, actual, exact)) > 0.9995


def test_far_keys_and_values_do_not_widen_the_codes():
    query, key, value = (t.detach() for t in heads())
    far = [query, key + 100, value - 100]
    near = [t.requires_grad_() for t in (query, key, value)]
    _, exact = gradients(F.scaled_dot_product_attention, near)
    _, actual = gradients(CodedAttention(None, False, 6), [t.detach().requires_grad_() for t in far])
    assert min(map(cosine, actual, exact)) > 0.99


def test_a_part_at_a_time_is_the_whole():
    operands = heads()
    whole, *others = [gradients(CodedAttention(None, False, 4, images), operands)[1] for images in (0, 1, 3)]
    for other in others:
        for a, b in zip(other, whole, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_keeps_its_codes_alone(bits):
    operands = heads()
    with Kept() as kept:
        y = CodedAttention(None, False, bits)(*operands)
    rows = 4 * 2 * 24
    assert kept.nbytes == 3 * Rows(bits).nbytes(rows * 16 // 64, 64) + Powers(bits).nbytes(rows, 24)
    del y


def test_rows_that_may_attend_to_nothing_have_finite_gradients():
    mask = torch.ones(24, 24, dtype=torch.bool)
    mask[3] = False
    _, actual = gradients(lambda q, k, v: CodedAttention(None, False, 8)(q, k, v, mask), heads())
    assert all(g.isfinite().all() for g in actual)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    operands = heads(dtype)
    _, exact = gradients(F.scaled_dot_product_attention, operands)
    _, actual = gradients(CodedAttention(None, False, 8), operands)
    assert {g.dtype for g in actual} == {dtype}
    assert min(map(cosine, actual, exact)) > 0.999


def kept_map(model, x, bits=8):
    return s2a_fx.transform(model, x, (CompressActivations(attention_bits=bits, attention_plan="map", smallest=1),))


def test_the_plan_of_a_model():
    model, x = small_model("vit")
    gm = kept_map(model, x)
    assert len(layers(gm, "CodedAttention")) == 3
    assert_near(gm, model, x, 0.98)


@pytest.mark.parametrize("part_bytes", [None, 1])
def test_predicted_bytes_are_those_held(part_bytes, monkeypatch):
    if part_bytes:
        monkeypatch.setattr(recompute, "PART_BYTES", part_bytes)
    model, x = small_model("vit")
    x = torch.cat((x, x, x))
    gm = kept_map(model, x, 4)
    assert s2a_fx.analyze(gm, x).saved_bytes == measure_saved_bytes(gm, (x,))


class Biased(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 16)
        self.bias = nn.Parameter(torch.zeros(24, 24))

    def forward(self, x):
        x = self.qkv(x)
        return F.scaled_dot_product_attention(x, x, x, self.bias)


@pytest.mark.parametrize("case", ["dropout", "a mask that trains"])
def test_what_does_not_fit_is_recomputed(case):
    model, x = small_model("vit", attn_drop_rate=0.5) if case == "dropout" else (Biased(), torch.randn(SHAPE))
    gm = kept_map(model, x)
    assert layers(gm, "CodedInput")
    assert not layers(gm, "CodedAttention")


def test_an_unknown_plan_is_refused():
    with pytest.raises(s2a_fx.InputError, match="recompute or map"):
        CompressActivations(attention_plan="flash")
