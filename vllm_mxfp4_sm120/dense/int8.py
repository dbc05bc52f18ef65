# SPDX-License-Identifier: Apache-2.0
"""INT8 weights: symmetric, a scale for each 32 along K, as llama.cpp's Q8_0 but with BF16 scales.

8.5 bits a weight, relative error about 0.5 % (E4M3: 2.6 %). A scale in FP16 would be no better, for codes are rounded
with the scale as stored, and would lose blocks below 2^-14.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Decode = Callable[[Tensor, Tensor], Tensor]
BLOCK, STEP = 32, 64  # values along K that share a scale, and whose scales lie together
LARGEST = 127  # -128 is left out, so that codes are symmetric
# BF16's largest number would have the first scale, 127 times which is beyond BF16; it gets the next smaller one.
TOO_LARGE, LARGEST_SCALE = 2.0**121 * (1 + 2.0**-7), 2.0**121
# Values that are decoded, or encoded, at once: 32 MiB of BF16, so that lm_head's 1.1 GiB never are. torch's allocator
# gives them, and again to the next layer on the same stream: one such block for each, and in a CUDA graph's pool, which
# vLLM counts when it measures what computing takes.
DECODED = 1 << 24
ENCODED = 1 << 19  # in FP32, with two copies: 6 MiB


@dataclass(frozen=True)
class Int8Weights:
    """codes int8 [N, K]; scales bfloat16 [K/64, N, 2]; weight[n, k] = codes[n, k] * scales[k / 64, n, k / 32 % 2].

    The scales of 64 along K lie side by side for all rows, as the kernels take them: a step of theirs reads them whole,
    where two scales of each row would be as many lines of memory. Of half a 64 at the end, the second is 0.
    """

    codes: Tensor
    scales: Tensor

    @classmethod
    def quantize(cls, weight: Tensor) -> Int8Weights:
        """Nearest codes for a weight [N, K], floating point, finite, K a multiple of 32. A few rows at a time."""
        rows, columns = weight.shape
        codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
        scales = torch.zeros(-(-columns // STEP), rows, STEP // BLOCK, dtype=torch.bfloat16, device=weight.device)
        for part in _parts(rows, columns, ENCODED):
            blocks = weight[part].float().unflatten(1, (-1, BLOCK))
            scale = (blocks.abs().amax(-1, keepdim=True) / LARGEST).bfloat16()
            scale.masked_fill_(scale == TOO_LARGE, LARGEST_SCALE)
            # A block of zeros, or of values whose scale is 0 in BF16, has codes of 0.
            blocks = (blocks / scale.float()).nan_to_num_(0, 0, 0).round_().clamp_(-LARGEST, LARGEST)
            codes[part] = blocks.flatten(1).to(torch.int8)
            scales[:, part] = _by_steps(scale.squeeze(-1))
        return cls(codes, scales)

    def update(self, weight: Tensor) -> None:
        """In place: rows of a weight [N, K] that aren't what these decode to, in its dtype, are encoded."""
        for part in _parts(weight.shape[0], weight.shape[1], ENCODED):
            changed = (weight[part] != self.decode(part, weight.dtype)).any(1, keepdim=True)
            new = Int8Weights.quantize(weight[part])
            self.codes[part] = torch.where(changed, new.codes, self.codes[part])
            self.scales[:, part] = torch.where(changed, new.scales, self.scales[:, part])

    @property
    def bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def decode(self, rows: slice | Tensor = slice(None), dtype: torch.dtype = torch.float32) -> Tensor:
        """[rows, K] in that dtype; products are rounded once."""
        blocks = self.codes[rows].unflatten(-1, (-1, BLOCK))
        scales = self.scales_of(rows).unsqueeze(-1)
        # To BF16 in one kernel, that reads codes and writes weights and nothing else: torch multiplies in FP32.
        decoded: Tensor = blocks * (scales if dtype == torch.bfloat16 else scales.float())
        return decoded.flatten(-2).to(dtype)

    def scales_of(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """[rows, K/32]."""
        return self.scales[:, rows].movedim(0, -2).flatten(-2)[..., : self.codes.shape[1] // BLOCK]

    def linear(self, x: Tensor, bias: Tensor | None = None, decode: Decode | None = None) -> Tensor:
        """x W^T + bias: x [..., K] -> [..., N], in the dtype of x, decoding at most `DECODED` weights at once.

        `decode` makes the weights of codes and scales, in that dtype; None: `self.decode`.
        """
        rows, columns = self.codes.shape
        parts = _parts(rows, columns, DECODED)
        if len(parts) == 1:
            return functional.linear(x, self._decoded(parts[0], x.dtype, decode), bias)
        out = x.new_empty(*x.shape[:-1], rows)
        for part in parts:
            weight = self._decoded(part, x.dtype, decode)
            out[..., part] = functional.linear(x, weight, None if bias is None else bias[part])
        return out

    def _decoded(self, rows: slice, dtype: torch.dtype, decode: Decode | None) -> Tensor:
        if decode is None:
            return self.decode(rows, dtype)
        return decode(self.codes[rows], self.scales[:, rows].contiguous())

    def relative_error(self, weight: Tensor) -> Tensor:
        """|decoded - weight| / |weight|, Frobenius, a float64 scalar on the weight's device; 0 for zeros."""
        wrong, right = weight.new_zeros(2, dtype=torch.float64).unbind()
        for part in _parts(weight.shape[0], weight.shape[1], ENCODED):
            exact = weight[part].double()
            right += torch.linalg.vector_norm(exact).square()
            wrong += torch.linalg.vector_norm(exact.sub_(self.decode(part))).square()
        return torch.where(right > 0, wrong / right, 0).sqrt()


def _by_steps(scales: Tensor) -> Tensor:
    """[N, K/32] -> [K/64, N, 2]."""
    steps: Tensor = functional.pad(scales, (0, scales.shape[1] % (STEP // BLOCK))).unflatten(1, (-1, STEP // BLOCK))
    return steps.transpose(0, 1)


def _parts(rows: int, columns: int, values: int) -> list[slice]:
    step = max(1, values // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
