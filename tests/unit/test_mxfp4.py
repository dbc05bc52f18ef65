# SPDX-License-Identifier: Apache-2.0
"""The number format, value by value, and against transformers' decoder."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from vllm_mxfp4_sm120 import mxfp4

# OCP Microscaling, table of E2M1, written out again: bias 1, two exponent bits, one mantissa bit.
E2M1 = torch.tensor(
    [
        (-1) ** (code >> 3)
        * (code % 2 / 2 if (code >> 1) % 4 == 0 else 2 ** ((code >> 1) % 4 - 1) * (1 + code % 2 / 2))
        for code in range(16)
    ],
    dtype=torch.float64,
)


def every_value() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All 16 codes, twice, under each of the 255 scales: bytes [255, 16], scales [255, 1], values float64 [255, 32]."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(255, 2)
    scales = torch.arange(255, dtype=torch.uint8)[:, None]
    exponents = torch.arange(-127, 128, dtype=torch.float64)[:, None]
    return mxfp4.pack(codes), scales, E2M1[codes.long()] * torch.pow(2.0, exponents)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_code_with_every_scale_is_exact(dtype):
    packed, scales, values = every_value()
    decoded = mxfp4.dequantize(packed, scales, dtype)
    representable = values.abs() <= torch.finfo(dtype).max
    assert decoded.dtype == dtype
    assert torch.equal(decoded.double()[representable], values[representable])
    # Only 4 and 6 at 2^126 and 2, 3, 4, 6 at 2^127 lie past the end of BF16 and float32.
    assert int((~representable).sum()) == (0 if dtype == torch.float64 else 24)
    assert decoded[~representable].isinf().all()
    assert torch.equal(decoded.signbit(), values.signbit())


def test_scale_255_is_nan():
    decoded = mxfp4.dequantize(torch.zeros(1, 16, dtype=torch.uint8), torch.tensor([[255]], dtype=torch.uint8))
    assert decoded.isnan().all()


def test_quantizing_what_was_dequantized_gives_the_same_values():
    values = every_value()[2]
    assert torch.equal(mxfp4.dequantize(*mxfp4.quantize(values), torch.float64), values)
    # Block by block of a single magnitude too, where the scale that comes back is another one.
    single = values[:, None, :] * (values.abs()[:, None, :] == values.abs()[:, :16, None])
    assert torch.equal(mxfp4.dequantize(*mxfp4.quantize(single), torch.float64), single)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_quantizing_random_blocks_again_changes_nothing(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (3, 5, 48), generator=generator, dtype=torch.uint8)
    scales = torch.randint(1, 250, (3, 5, 3), generator=generator, dtype=torch.uint8)
    values = mxfp4.dequantize(packed, scales, dtype)
    assert torch.equal(mxfp4.dequantize(*mxfp4.quantize(values), dtype), values)


def test_rounding_is_to_the_nearest_and_ties_to_the_even_code():
    halfway = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}
    near = {0.26: 0.5, 0.74: 0.5, 1.24: 1.0, 1.26: 1.5, 2.51: 3.0, 3.49: 3.0, 5.01: 6.0, 7.9: 6.0}
    given_values = [*halfway, *near, 4.0]  # the 4 keeps the block's scale at 1
    block = torch.zeros(32)
    block[: len(given_values)] = torch.tensor(given_values)
    expected = torch.zeros(32)
    expected[: len(given_values)] = torch.tensor([*halfway.values(), *near.values(), 4.0])
    for sign in (1, -1):
        codes, scales = mxfp4.quantize(block * sign)
        assert scales.tolist() == [127]
        assert torch.equal(mxfp4.dequantize(codes, scales, torch.float32), expected * sign)


@pytest.mark.parametrize(("largest", "scale"), [(4.0, 127), (7.99, 127), (8.0, 128), (3.99, 126), (1e-45, 0), (0.0, 0)])
def test_scale_is_the_largest_exponent_less_two(largest, scale):
    block = torch.zeros(32)
    block[5] = largest
    assert mxfp4.quantize(block)[1].tolist() == [scale]


def test_packing_puts_the_earlier_code_in_the_low_nibble():
    assert mxfp4.pack(torch.tensor([0x3, 0xA], dtype=torch.uint8)).tolist() == [0xA3]
    assert mxfp4.unpack(torch.tensor([0xA3], dtype=torch.uint8)).tolist() == [0x3, 0xA]
    everything = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(mxfp4.pack(mxfp4.unpack(everything)), everything)


def test_views_that_are_not_contiguous_decode_the_same():
    packed = torch.randint(0, 256, (4, 6, 64), dtype=torch.uint8)
    scales = torch.randint(100, 150, (4, 6, 4), dtype=torch.uint8)
    whole = mxfp4.dequantize(packed, scales, torch.float32)
    part = mxfp4.dequantize(packed[1, ::2, 16:48], scales[1, ::2, 1:3], torch.float32)
    assert torch.equal(part, whole[1, ::2, 32:96])


def test_the_same_values_as_transformers():
    blocks = torch.randint(0, 256, (2, 64, 3, 16), dtype=torch.uint8)
    scales = torch.randint(100, 150, (2, 64, 3), dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales).transpose(1, 2)
    assert torch.equal(mxfp4.dequantize(blocks.flatten(-2), scales), theirs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError) as error:
        mxfp4.quantize(torch.tensor([bad] * 32))
    assert str(error.value) == "quantize: values must be finite, found infinity or NaN; MXFP4 codes can hold neither"


def test_part_of_a_block_is_refused():
    with pytest.raises(ValueError) as error:
        mxfp4.quantize(torch.zeros(2, 40))
    assert str(error.value) == "quantize: the last dimension is 40, expected a multiple of 32"
