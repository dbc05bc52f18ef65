# SPDX-License-Identifier: Apache-2.0
"""The dense kernels of the CUDA library: y = x W^T + b for few tokens, W in BF16 or INT8."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

FIRST_FIT = -1  # of the kernels, the first that takes all tokens at once


@dataclass(frozen=True)
class DenseConfiguration:
    """One entry of the library's table of dense kernels, and what a block of it needs."""

    name: str
    int8: bool
    tokens: int  # that share one reading of the weights; more are taken in groups of so many
    threads: int
    shared_bytes: int


@lru_cache
def configurations() -> tuple[DenseConfiguration, ...]:
    """The table. The library must be loaded."""
    entries = zip(*torch.ops.mxfp4_sm120.dense_configurations(), strict=True)
    return tuple(DenseConfiguration(name, bool(int8), *rest) for name, int8, *rest in entries)


@dataclass(frozen=True)
class Limits:
    """Of one call: how many tokens at most, and what K is a multiple of."""

    tokens: int
    k_multiple: int


@lru_cache
def limits() -> Limits:
    """Of all kernels. The library must be loaded."""
    return Limits(*torch.ops.mxfp4_sm120.dense_limits())


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None, kernel: int = FIRST_FIT
) -> Tensor:
    """x bf16 [M, K], weight bf16 [N, K] or int8 with scale bf16 [K/64, N, 2] (`Int8Weights`), bias bf16 [N] -> [M, N].

    K and M are within `limits()`. `kernel` is a place in `configurations()`. Sums are FP32 in a
    fixed order, rounded once. Weights are read before the previous kernel ends,
    which must not write them. Raises RuntimeError, in one line, for anything else.
    """
    out: Tensor = torch.ops.mxfp4_sm120.dense_linear(x, weight, scale, bias, kernel)
    return out


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """codes int8 [N, K], scales bf16 [K/64, N, 2], K a multiple of 32 -> the weights, bf16 [N, K], rounded once."""
    out: Tensor = torch.ops.mxfp4_sm120.dense_dequantize(codes, scales)
    return out
