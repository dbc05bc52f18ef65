# SPDX-License-Identifier: Apache-2.0
"""Floats to MXFP4 codes and scales, and how far the two are apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_mxfp4_sm120 import mxfp4

# `--search` tries these steps from the MX rule's scale, which comes first so that it wins a tie. Doubling it keeps the
# largest value from saturating at 6: better for one block in seven of normal numbers. Halving it can only pay where
# `moments` weigh the largest value little.
STEPS = (0, 1, -1)


@dataclass(frozen=True)
class Error:
    """Sums over weights w and what they became: (w - packed)^2 and w^2."""

    squared: float = 0.0
    total: float = 0.0

    def __add__(self, other: Error) -> Error:
        return Error(self.squared + other.squared, self.total + other.total)

    @property
    def relative_rms(self) -> float:
        """Root of the mean squared error over the root of the mean square; 0 for zeros."""
        return math.sqrt(self.squared / self.total) if self.total else 0.0

    @property
    def sqnr_db(self) -> float:
        """Signal over quantization noise in decibels; infinite where nothing was rounded."""
        return -20 * math.log10(self.relative_rms) if self.relative_rms else math.inf


def encode(
    values: Tensor, known: Tensor | None = None, search: bool = False, moments: Tensor | None = None
) -> tuple[Tensor, Tensor, Error]:
    """Weights [rows, K] of any float dtype -> codes uint8 [rows, K/2], scales uint8 [rows, K/32], and their error.

    known uint8 [rows, K/32]: scales that a block had before; where they still hold it exactly, they are kept.
    search: of a block's neighbouring scales the one with the least squared error; moments float [K], the mean squares
    of what the weights are multiplied by, weigh it. Raises ValueError for values that are not finite.
    """
    codes, scales = mxfp4.quantize(values)
    wide = values.float()
    if search:
        codes, scales = _search(wide, codes, scales, moments)
    if known is not None:
        codes, scales = _keep_known(wide, codes, scales, known)
    difference = (wide - mxfp4.dequantize(codes, scales, torch.float32)).double()
    return codes, scales, Error(float(difference.square().sum()), float(wide.double().square().sum()))


def _search(wide: Tensor, codes: Tensor, scales: Tensor, moments: Tensor | None) -> tuple[Tensor, Tensor]:
    weights = None if moments is None else moments.float().clamp(min=0)
    best, start = None, scales.int()
    codes = codes.unflatten(-1, (-1, mxfp4.BLOCK // 2))
    for step in STEPS:
        tried = (start + step).clamp(0, mxfp4.MAX_FINITE_SCALE).to(torch.uint8)
        encoded = mxfp4.encode(wide, tried)
        error = (wide - mxfp4.dequantize(encoded, tried, torch.float32)).square()
        error = (error if weights is None else error * weights).unflatten(-1, (-1, mxfp4.BLOCK)).sum(-1)
        if best is None:
            best = error
            continue
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, tried, scales)
        codes = torch.where(better[..., None], encoded.unflatten(-1, (-1, mxfp4.BLOCK // 2)), codes)
    return codes.flatten(-2), scales


def _keep_known(wide: Tensor, codes: Tensor, scales: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    possible = known.clamp(max=mxfp4.NAN_SCALE - 1)
    encoded = mxfp4.encode(wide, possible)
    exact = (mxfp4.dequantize(encoded, possible, torch.float32) == wide).unflatten(-1, (-1, mxfp4.BLOCK)).all(-1)
    exact &= known != mxfp4.NAN_SCALE
    width = (-1, mxfp4.BLOCK // 2)
    codes = torch.where(exact[..., None], encoded.unflatten(-1, width), codes.unflatten(-1, width))
    return codes.flatten(-2), torch.where(exact, known, scales)
