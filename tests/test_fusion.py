"""Fused lines: the same bits compiled and uncompiled, and where nothing can be compiled."""

import itertools
import warnings

import pytest
import torch
from torch.library import opcheck

from s2a_fx import fusion
from s2a_fx.codecs.bins import encode_bins, scale_by_bins
from s2a_fx.codecs.rows import decode_rows, encode_rows
from s2a_fx.ops.activation import encode_mask, scale_by_mask

_WIDTHS = itertools.count(1)


@pytest.fixture
def compiled(monkeypatch):
    """Compile fused operators in this test, whatever the environment says."""
    monkeypatch.setattr(fusion, "_enabled", True)
    assert fusion.compiling()


def fresh(rows=5):
    """A tensor of a width that no kernel has been made for."""
    return torch.randn(rows, 8 * (40 + next(_WIDTHS)))


def same_bits(operator, *arguments):
    actual = operator(*arguments)
    with fusion.eager():
        assert not fusion.compiling()
        expected = operator(*arguments)
    as_tuple = [t if isinstance(t, tuple) else (t,) for t in (actual, expected)]
    return all(torch.equal(a, b) and a.dtype is b.dtype for a, b in zip(*as_tuple, strict=True))


@pytest.mark.slow
def test_compiled_rows_have_the_same_bits(compiled):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a fall-back would hide what this test is for
        for rows in (1, 2, 7):
            assert same_bits(encode_rows, torch.randn(rows, 24) * 3 + 1, 6)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_codes_and_decoded_rows_have_the_same_bits(compiled, bits, dtype):
    for rows in (1, 5, 300):
        x = (torch.randn(rows, 64) * 3 + 1).to(dtype)
        assert same_bits(encode_rows, x, bits)
        assert same_bits(decode_rows, *encode_rows(x, bits), bits)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_masks_have_the_same_bits(compiled, dtype):
    for rows in (1, 5, 300):
        x = torch.randn(rows, 64).to(dtype)
        assert same_bits(encode_mask, x, 0.0, float("inf"), False, False)
        assert same_bits(scale_by_mask, x, encode_mask(x, 0.0, 6.0, False, False), 1.0, 0.1)


def failing_compile(message, at_once):
    """A `torch.compile` without a compiler: it fails when called, or what it returns does."""

    def fail(*args, **kwargs):
        raise RuntimeError(message)

    return fail if at_once else lambda *args, **kwargs: fail


@pytest.mark.parametrize("message", ["no C++ compiler\nsecond line", ""], ids=["message", "no message"])
@pytest.mark.parametrize("at_once", [False, True], ids=["at the first call", "at once"])
def test_without_a_compiler_it_warns_once_and_gives_the_same_bits(compiled, monkeypatch, message, at_once):
    monkeypatch.setattr(torch, "compile", failing_compile(message, at_once))
    x = fresh()
    with pytest.warns(UserWarning, match="encode_rows: .*uncompiled"):
        first = encode_rows(x, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        second = encode_rows(x, 5)
    with fusion.eager():
        expected = encode_rows(x, 5)
    for a, b, e in zip(first, second, expected, strict=True):
        assert torch.equal(a, e)
        assert torch.equal(b, e)


def test_errors_of_the_lines_themselves_are_raised(compiled, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    with warnings.catch_warnings(), pytest.raises(RuntimeError):
        warnings.simplefilter("ignore")
        decode_rows(torch.zeros(3, 18, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.bfloat16), 6)


def test_eager_ends_with_its_context(compiled):
    with fusion.eager(), fusion.eager():
        pass
    assert fusion.compiling()
    with pytest.raises(KeyError), fusion.eager():
        raise KeyError
    assert fusion.compiling()


def opcheck_cases():
    x, codes = torch.randn(4, 32), torch.randint(0, 255, (4, 24), dtype=torch.uint8)
    return [
        (encode_rows, (x, 6)),
        (decode_rows, (codes, torch.ones(4, 2, dtype=torch.bfloat16), 6)),
        (encode_mask, (x, 0.0, 6.0, False, False)),
        (scale_by_mask, (x, codes[:, :4].contiguous(), 1.0, 0.0)),
        (encode_bins, (x, [-1.0, 0.0, 1.0], 2)),
        (scale_by_bins, (x, codes[:, :8].contiguous(), [0.0, 0.5, 1.0, 1.1], 2)),
    ]


@pytest.mark.parametrize(("operator", "arguments"), opcheck_cases())
def test_opcheck(operator, arguments):
    results = opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    assert set(results.values()) == {"SUCCESS"}
