# SPDX-License-Identifier: Apache-2.0
"""The number format MXFP4: 4-bit E2M1 codes, one 8-bit E8M0 scale for every 32 of them (OCP Microscaling, MX v1.0).

A code is sign, two exponent bits, one mantissa bit; a scale byte s means 2^(s - 127), and 255 means NaN. Two codes
share a byte, the earlier one in the low nibble. Everything here is plain torch and runs on any device.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 32  # values that share a scale: the MX specification's block size, and GPT-OSS's only one
NAN_SCALE = 255
SCALE_BIAS = 127
E2M1_MAX_EXPONENT = 2  # of 6 = 1.5 * 2^2, the largest E2M1 value
MAX_FINITE_SCALE = 252  # 6 * 2^(252 - 127) is a BF16 and float32 number, the next scale's 6 is infinite in both

# Code -> value. The sign is bit 3; 0 and 8 are the two zeros, 1 and 9 the subnormal.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

# One table entry is the two values of a byte; reading both as one word makes decoding a single gather.
_PAIR_WORD = {2: torch.int32, 4: torch.int64, 8: torch.complex128}


def pack(codes: Tensor) -> Tensor:
    """Codes uint8 [..., K] below 16, K even -> bytes uint8 [..., K/2], the earlier code in the low nibble."""
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Bytes uint8 [..., K/2] -> codes uint8 [..., K]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


@lru_cache
def _pair_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256] words, each the two values of a byte."""
    byte = torch.arange(256)
    values = torch.tensor(E2M1_VALUES, dtype=dtype)
    pairs = torch.stack((values[byte & 15], values[byte >> 4]), dim=-1)
    return pairs.view(_PAIR_WORD[dtype.itemsize]).flatten().to(device)


@lru_cache
def _scale_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256] scales; 255 is NaN."""
    exponents = torch.arange(256, dtype=torch.float64) - SCALE_BIAS
    table = exponents.exp2()
    table[NAN_SCALE] = float("nan")
    return table.to(dtype).to(device)


def scale_values(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """E8M0 bytes uint8 [...] -> 2^(s - 127) in `dtype`, NaN for 255. Exact in bfloat16, float32 and float64."""
    return _scale_table(dtype, scales.device).index_select(0, scales.int().reshape(-1)).view(scales.shape)


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Packed codes uint8 [..., K/2] and scales uint8 [..., K/32] -> values [..., K] in `dtype`.

    Exact in bfloat16, float32 and float64: a value has two significant bits, and the smallest, 0.5 * 2^-127, is a
    subnormal of the first two. Their range ends below 4 * 2^126: large codes at scales 253 and 254 are infinite.
    """
    words = _pair_table(dtype, codes.device).index_select(0, codes.int().reshape(-1))
    values = words.view(dtype).view(*scales.shape, BLOCK)
    return values.mul_(scale_values(scales, dtype)[..., None]).flatten(-2)


def nonzero_blocks(codes: Tensor) -> Tensor:
    """Packed codes uint8 [..., K/2] -> bool [..., K/32]: which blocks hold anything but zeros."""
    nonzero: Tensor = (codes & 0x77).ne(0).unflatten(-1, (-1, BLOCK // 2)).any(-1)
    return nonzero


def first_outside(codes: Tensor, scales: Tensor, low: int, high: int) -> tuple[int, int, int] | None:
    """The first block (expert, row, block) whose scale is not `low` to `high`, None if every block's is.

    codes uint8 [E, rows, K/2], scales uint8 [E, rows, K/32]. A block of zeros may have any scale but NaN. Waits for the
    device.
    """
    outside = (scales < low) | (scales > high)
    for expert in outside.any(-1).any(-1).nonzero()[:, 0].tolist():
        counts = nonzero_blocks(codes[expert]) | (scales[expert] == NAN_SCALE)
        for row, block in (outside[expert] & counts).nonzero()[:1].tolist():
            return expert, row, block
    return None


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Finite values [..., K] of any float dtype, K % 32 == 0 -> codes uint8 [..., K/2], scales uint8 [..., K/32].

    The OCP MX rule: a block's scale is 2^(floor(log2(largest magnitude)) - 2), the values over it are rounded to the
    nearest E2M1, ties to the even code, and saturate at 6. What came from `dequantize` gives the same values back.
    Raises ValueError for values that are not finite or a K that is not a multiple of 32.
    """
    if values.shape[-1] % BLOCK:
        raise ValueError(f"quantize: the last dimension is {values.shape[-1]}, expected a multiple of {BLOCK}")
    if not bool(values.isfinite().all()):
        raise ValueError("quantize: values must be finite, found infinity or NaN; MXFP4 codes can hold neither")
    scales = block_scales(values)
    return encode(values, scales), scales


def block_scales(values: Tensor) -> Tensor:
    """Finite values [..., K] -> the scale uint8 [..., K/32] that the OCP MX rule gives each block; 0 for zeros."""
    largest = values.unflatten(-1, (-1, BLOCK)).abs().amax(-1)
    largest = largest if largest.dtype == torch.float64 else largest.float()
    # frexp gives mantissas in [0.5, 1), so floor(log2) is its exponent less one. Zeros take the smallest scale.
    exponent = torch.frexp(largest).exponent - 1 - E2M1_MAX_EXPONENT
    exponent = torch.where(largest > 0, exponent, -SCALE_BIAS).clamp(-SCALE_BIAS, SCALE_BIAS)
    return (exponent + SCALE_BIAS).to(torch.uint8)


def encode(values: Tensor, scales: Tensor) -> Tensor:
    """Finite values [..., K] over given scales uint8 [..., K/32] below 255 -> packed codes uint8 [..., K/2].

    Each value over its scale is rounded to the nearest E2M1, ties to the even code, and saturates at 6.
    """
    # Up to 32 bits, float32 is exact: a power of two moves the exponent only, and what underflows is far below 0.25,
    # where codes begin.
    blocks = values if values.dtype == torch.float64 else values.float()
    inverse = scale_values(2 * SCALE_BIAS - scales, blocks.dtype)
    scaled = blocks.unflatten(-1, (-1, BLOCK)) * inverse[..., None]
    return pack(_round_to_e2m1(scaled).flatten(-2))


def _round_to_e2m1(values: Tensor) -> Tensor:
    """Float values -> codes uint8 of the nearest E2M1 values, ties to the even code, saturating.

    E2M1 steps by 0.5 up to 2, by 1 up to 4, by 2 up to 6; `round` takes a tie to the even number, which is the even
    code in each of the three. Of the three codes the least is right: the others' steps are too fine or start too high.
    """
    magnitude = values.abs().clamp_(max=6.0)
    code = (magnitude * 2).round_()
    torch.minimum(code, magnitude.round().add_(2), out=code)
    torch.minimum(code, magnitude.div_(2).round_().add_(4), out=code)
    return code.to(torch.uint8) | (values.signbit().to(torch.uint8) << 3)
