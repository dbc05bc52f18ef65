# SPDX-License-Identifier: Apache-2.0
"""Codes and scales against encoders that we didn't write, and the search against every scale there is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_mxfp4_sm120 import mxfp4
from vllm_mxfp4_sm120.packing.encode import Error, encode

pytestmark = pytest.mark.usefixtures("one_thread")
VALUES = torch.tensor(mxfp4.E2M1_VALUES, dtype=torch.float64)


def weights(rows: int = 64, blocks: int = 8, seed: int = 0) -> Tensor:
    """Normal numbers, some of them large, in BF16."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, blocks * mxfp4.BLOCK, generator=generator)
    large = torch.rand(normal.shape, generator=generator) < 0.02
    return (normal * torch.where(large, 8.0, 1.0) * 0.03).bfloat16()


def by_brute_force(values: Tensor, moments: Tensor) -> Tensor:
    """The least weighted squared error [rows, blocks] of any of the scales near a block's largest value, in float64."""
    blocks = values.double().unflatten(-1, (-1, mxfp4.BLOCK))
    weight = moments.double().unflatten(-1, (-1, mxfp4.BLOCK))
    start = mxfp4.block_scales(values).int()
    errors = []
    for step in (-1, 0, 1):
        scale = torch.exp2((start + step - mxfp4.SCALE_BIAS).double())[..., None]
        nearest = (blocks[..., None] - scale[..., None] * VALUES).abs().amin(-1)
        errors.append((nearest.square() * weight).sum(-1))
    return torch.stack(errors).amin(0)


def test_codes_are_those_of_compressed_tensors() -> None:
    """Its rounding to E2M1, its packing and its exponents, on the same values over the same scales."""
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    cast = pytest.importorskip("compressed_tensors.quantization.quant_args").FP4_E2M1_DATA.cast_to_fp4
    values = weights()
    codes, scales = mxfp4.quantize(values)
    scaled = values.float() / torch.exp2(scales.float() - mxfp4.SCALE_BIAS).repeat_interleave(mxfp4.BLOCK, -1)
    theirs = helpers.pack_fp4_to_uint8(cast(scaled.clamp(-6, 6)))
    assert torch.equal(codes, theirs)


def test_search_finds_the_best_scale() -> None:
    values, moments = weights(), torch.rand(256, generator=torch.Generator().manual_seed(1)) ** 8
    for weigh in (None, moments):
        codes, scales, error = encode(values, search=True, moments=weigh)
        weight = torch.ones(256) if weigh is None else weigh
        difference = (values.double() - mxfp4.dequantize(codes, scales, torch.float64)).square() * weight.double()
        found = difference.unflatten(-1, (-1, mxfp4.BLOCK)).sum(-1)
        torch.testing.assert_close(found, by_brute_force(values, weight), rtol=1e-5, atol=0)
        assert not torch.equal(scales, mxfp4.quantize(values)[1])
        if weigh is None:
            assert error.relative_rms < encode(values)[2].relative_rms


def test_moments_let_a_block_forget_its_largest_value() -> None:
    values = torch.full((1, 32), 0.7)
    values[0, 0] = 7.0
    moments = torch.ones(32)
    moments[0] = 0.0
    assert encode(values, search=True)[1] == 127
    assert encode(values, search=True, moments=moments)[1] == 126


def test_error_is_that_of_the_values() -> None:
    values = weights()
    codes, scales, error = encode(values)
    back = mxfp4.dequantize(codes, scales, torch.float64)
    expected = (values.double() - back).norm() / values.double().norm()
    assert error.relative_rms == pytest.approx(expected.item(), rel=1e-6)
    assert error.sqnr_db == pytest.approx(-20 * torch.log10(expected).item(), rel=1e-6)
    assert (error + error).relative_rms == pytest.approx(error.relative_rms)
    assert (Error().relative_rms, Error().sqnr_db) == (0.0, float("inf"))


@settings(max_examples=200)
@given(
    st.lists(st.integers(0, 255), min_size=16, max_size=16),
    st.integers(0, mxfp4.MAX_FINITE_SCALE),
    st.sampled_from([0xFF, 0xBB, 0x99, 0x88]),
    st.booleans(),
)
def test_a_known_scale_gives_every_block_back(block: list[int], scale: int, mask: int, search: bool) -> None:
    """`mask` makes blocks whose largest code is small: their numbers have several encodings. BF16 in between."""
    codes = torch.tensor([block], dtype=torch.uint8) & mask
    scales = torch.tensor([[scale]], dtype=torch.uint8)
    values = mxfp4.dequantize(codes, scales)
    again, found, error = encode(values, scales, search)
    assert torch.equal(again, codes) and torch.equal(found, scales) and error.squared == 0
    # Without it the numbers are the same, if not the bytes.
    again, found, _ = encode(values)
    assert torch.equal(mxfp4.dequantize(again, found).view(torch.int16), values.view(torch.int16))


def test_a_known_scale_that_no_longer_fits_is_not_kept() -> None:
    values = weights(1, 2)
    known = mxfp4.quantize(values)[1] + 3
    known[0, 1] = mxfp4.NAN_SCALE
    assert torch.equal(encode(values, known)[1], mxfp4.quantize(values)[1])
