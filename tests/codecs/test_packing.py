"""Packing: codes come back as they went in, and take the bits that they are said to take."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2a_fx.codecs.packing import MULTIPLE, pack, packed_width, unpack


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 8), st.integers(0, 5), st.integers(1, 9), st.integers(0, 2**32))
def test_codes_come_back_and_take_their_bits(bits, rows, eighths, seed):
    width = MULTIPLE * eighths
    codes = torch.randint(0, 2**bits, (rows, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype is torch.uint8
    assert packed.shape == (rows, packed_width(width, bits)) == (rows, width * bits // 8)
    assert torch.equal(torch.cat(unpack(packed, bits), 1), codes.float())


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_comes_back_at_every_place(bits):
    codes = (torch.arange(2**bits).view(-1, 1) + torch.arange(16)).remainder(2**bits).to(torch.uint8)
    assert torch.equal(torch.cat(unpack(pack(codes, bits), bits), 1), codes.float())


def test_rows_are_packed_alone():
    codes = torch.randint(0, 64, (5, 24), dtype=torch.uint8)
    assert torch.equal(torch.cat([pack(row.unsqueeze(0), 6) for row in codes]), pack(codes, 6))
