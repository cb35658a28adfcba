"""Dropout in one bit an element: the draws and the gradient of `F.dropout`."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_bytes import Kept
from torch.library import opcheck

from s2a_fx.nn.coded import CodedDropout
from s2a_fx.ops.dropout import dropout

SHAPES = st.lists(st.integers(0, 7), min_size=1, max_size=4).map(tuple)
ROUNDING = {torch.float32: 2e-7, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # plain dropout rounds 1 / (1 - p) to the dtype


def both(x, p, seed=3):
    """Coded and plain dropout of the same draws, each with its gradient for the same random one."""
    grad, found = torch.randn(x.shape).to(x.dtype), []
    for function in (lambda t: dropout(t, p)[0], lambda t: F.dropout(t, p)):
        torch.manual_seed(seed)
        y = function(x)
        found.append((y.detach(), *torch.autograd.grad(y, x, grad)))
    return found


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from(list(ROUNDING)), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]))
def test_draws_and_gradient_of_plain_dropout(shape, dtype, p):
    x = torch.randn(*shape, 2).to(dtype)[..., 0].detach().requires_grad_()
    (y, grad), (reference, reference_grad) = both(x, p)
    assert torch.equal(y, reference)
    assert torch.equal(grad == 0, reference_grad == 0)
    torch.testing.assert_close(grad, reference_grad, rtol=ROUNDING[dtype], atol=0)


LAST = torch.randn(2, 16, 6, 10).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "x",
    [LAST, LAST[:, :, ::2], LAST[:, :8], LAST.transpose(1, 2), torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d)],
    ids=["channels_last", "rows of it", "channels of it", "transposed", "channels_last_3d"],
)
def test_any_memory_layout(x):
    (y, grad), (reference, reference_grad) = both(x.detach().requires_grad_(), 0.5)
    assert torch.equal(y, reference)
    assert torch.equal(grad, reference_grad)


@pytest.mark.parametrize("shape", [(3, 1024), (5, 64), (3, 7), (2, 3, 5, 8)])
def test_one_bit_an_element_is_kept(shape):
    x = torch.randn(shape, requires_grad=True)
    with Kept() as kept:
        y = dropout(x, 0.5)[0]
    assert x.numel() <= kept.nbytes * 8 < x.numel() + 64
    del y


def test_generator_stands_where_plain_dropout_leaves_it():
    x = torch.randn(5, 7, requires_grad=True)
    torch.manual_seed(0)
    dropout(x, 0.3)
    after = torch.rand(3)
    torch.manual_seed(0)
    F.dropout(x, 0.3)
    assert torch.equal(torch.rand(3), after)


def test_the_layer_is_plain_dropout_in_eval_mode_and_without_a_gradient():
    layer, x = CodedDropout(0.5), torch.randn(6, 6, requires_grad=True)
    assert torch.equal(layer.eval()(x), x)
    layer.train()
    torch.manual_seed(0)
    with torch.no_grad():
        y = layer(x)
    torch.manual_seed(0)
    assert torch.equal(y, F.dropout(x, 0.5))


@pytest.mark.parametrize("x", [torch.randn(3, 5, requires_grad=True), torch.randn(4, 64)])
def test_opcheck(x):
    results = opcheck(dropout, (x, 0.5), test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
    assert set(results.values()) == {"SUCCESS"}
