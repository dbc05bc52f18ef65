# SPDX-License-Identifier: Apache-2.0
"""Activations as a sum of MXFP4 terms: x = q1 s1 + q2 s2 + ..., each term with a power-of-two scale for 32 values.

A term's codes are the nearest E2M1 values of what the terms before it left over. So FP4 tensor cores can multiply
activations of 16 bits: a product for each term, all into the same sum. docs/fp4.md says how exact that is.

This is the definition, bit by bit, of what a kernel computes. A block's scale is the smallest power of two s with
largest magnitude <= 7 s: without a largest number, rounding would send what lies between 5 and 7 to 6 as well, so that
saturating at 6 never costs more than rounding does. Every step is exact in float32 as long as subnormals are kept:
multiplying by a power of two, the product of a code and a scale, and (by Sterbenz's lemma) the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_mxfp4_sm120 import mxfp4

MAX_TERMS = 4
MANTISSA_BITS = 23  # of float32
INFINITY_BITS = 0x7F800000
# 7 s = 1.75 * 2^2 s: a largest magnitude of 1.75 * 2^e or less has the scale 2^(e - 2). Adding all that 1.75's mantissa
# leaves room for carries into the exponent where the mantissa is larger.
UP_FROM_7 = 0x1FFFFF


def split(x: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """x BF16 or FP32 [..., K], K % 32 == 0 -> codes uint8 [terms, ..., K/2], scales uint8 [terms, ..., K/32].

    Scales are 0 to 252; a block of zeros has 0. A block with NaN or infinity has the scale 255 and codes of 0 in each
    term, so that it is NaN and its row's products are. A code has the sign of what it stands for, zeros too.

    The sum of t terms is within max(largest / (3.5 * 8^(t - 1)), 2^-128) of x, `largest` being the block's.
    Raises ValueError for other dtypes and shapes, and for fewer terms than 1 or more than 4.
    """
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"split: x is {x.dtype}, expected torch.bfloat16 or torch.float32")
    if x.ndim == 0 or x.shape[-1] % mxfp4.BLOCK:
        raise ValueError(f"split: x is {list(x.shape)}, expected its last dimension a multiple of {mxfp4.BLOCK}")
    if not 1 <= terms <= MAX_TERMS:
        raise ValueError(f"split: {terms} terms, expected 1 to {MAX_TERMS}")
    rest = x.float()
    damaged = _largest_bits(rest) >= INFINITY_BITS
    rest = rest.unflatten(-1, (-1, mxfp4.BLOCK)).masked_fill(damaged[..., None], 0.0).flatten(-2)
    codes, scales = [], []
    for _ in range(terms):
        scale = term_scales(rest)
        code = mxfp4.encode(rest, scale)
        rest = rest - mxfp4.dequantize(code, scale, torch.float32)
        codes.append(code)
        scales.append(scale.masked_fill(damaged, mxfp4.NAN_SCALE))
    return torch.stack(codes), torch.stack(scales)


def join(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Codes uint8 [terms, ..., K/2] and scales uint8 [terms, ..., K/32] -> the terms' sum [..., K].

    Added in float64 and rounded to `dtype` once.
    """
    return mxfp4.dequantize(codes, scales, torch.float64).sum(0).to(dtype)


def term_scales(values: Tensor) -> Tensor:
    """Finite float32 [..., K] -> the scale uint8 [..., K/32] of a term that stands for them, 0 to 252."""
    # A scale means 2^(scale - 127), as the exponent field does; less 2 for the 4 of 7 = 1.75 * 4.
    scale = ((_largest_bits(values) + UP_FROM_7) >> MANTISSA_BITS) - mxfp4.E2M1_MAX_EXPONENT
    return scale.clamp(0, mxfp4.MAX_FINITE_SCALE).to(torch.uint8)


def _largest_bits(values: Tensor) -> Tensor:
    """float32 [..., K] -> int32 [..., K/32], the bits of each block's largest magnitude, where infinity < NaN."""
    magnitudes = values.view(torch.int32) & 0x7FFFFFFF
    largest: Tensor = magnitudes.unflatten(-1, (-1, mxfp4.BLOCK)).amax(-1)
    return largest
