# SPDX-License-Identifier: Apache-2.0
"""Number formats for what enters the experts' products, each as the values that it can hold.

    bf16                  as served today
    fp8                   E4M3, a float32 scale for each row
    mxfp8, mxfp8x2        E4M3, a power of two for each 32 values; two terms: what is left is written so again
    mxfp4x1 to mxfp4x4    one to four FP4 terms (vllm_mxfp4_sm120/terms.py)

`named("mxfp4x3")` is a format for both products, `named("mxfp4x4,mxfp4x3")` the first for gate_up and the second for
down. The activation behind SwiGLU is in float32 when it gets its format; gate_up's input has come through BF16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from vllm_mxfp4_sm120 import terms
from vllm_mxfp4_sm120.mxfp4 import BLOCK

E4M3_MAX = 448.0
PRODUCTS = ("gate_up", "down")

Format = Callable[[Tensor], Tensor]  # [..., K] of any floating dtype -> the same, in the values of the format
Formats = dict[str, Format]  # by product


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


def fp8(x: Tensor) -> Tensor:
    scale = (x.abs().amax(-1, keepdim=True) / E4M3_MAX).float().clamp(min=torch.finfo(torch.float32).tiny)
    return _e4m3(x / scale) * scale


def mxfp8(x: Tensor, count: int = 1) -> Tensor:
    rest = x.unflatten(-1, (-1, BLOCK))
    for _ in range(count):
        scale = power_of_two_above(rest.abs().amax(-1, keepdim=True) / E4M3_MAX)
        rest = rest - _e4m3(rest / scale) * scale
    return x - rest.flatten(-2)


def mxfp4(x: Tensor, count: int) -> Tensor:
    return terms.join(*terms.split(x.float(), count), x.dtype)


def _e4m3(x: Tensor) -> Tensor:
    return x.float().to(torch.float8_e4m3fn).to(x.dtype)


def power_of_two_above(x: Tensor) -> Tensor:
    """The smallest power of two that is no less; 1 for 0."""
    mantissa, exponent = torch.frexp(x)  # the mantissa is in [0.5, 1)
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).int())


FORMATS: dict[str, Format] = {
    "bf16": bf16,
    "fp8": fp8,
    "mxfp8": mxfp8,
    "mxfp8x2": partial(mxfp8, count=2),
    **{f"mxfp4x{count}": partial(mxfp4, count=count) for count in range(1, terms.MAX_TERMS + 1)},
}


def named(words: str) -> Formats:
    """Raises ValueError for what isn't one or two of the formats above."""
    names = words.split(",")
    if not set(names) <= FORMATS.keys() or len(names) > len(PRODUCTS):
        raise ValueError(f"experts={words}, expected one of {', '.join(FORMATS)}, or two of them as mxfp4x4,mxfp4x3")
    gate_up, down = FORMATS[names[0]], FORMATS[names[-1]]
    return {"gate_up": lambda x: gate_up(bf16(x)), "down": down}
