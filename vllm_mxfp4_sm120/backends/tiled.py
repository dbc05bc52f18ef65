# SPDX-License-Identifier: Apache-2.0
"""Weight-only in plain torch: packed weights stay as they are, and one tile at a time is decoded and multiplied.

Slower than a fused kernel, but it needs nothing beyond torch and runs on CPU and CUDA.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from vllm_mxfp4_sm120 import mxfp4, settings
from vllm_mxfp4_sm120.backends.base import Prepared
from vllm_mxfp4_sm120.backends.eager import Eager
from vllm_mxfp4_sm120.moe import MoEShape, MoEWeights, activate
from vllm_mxfp4_sm120.platform import Machine
from vllm_mxfp4_sm120.routing import Grouped, Segment

# A decoded tile is TILE_ROWS x TILE_K values: 2 MB in BF16, 4 MB in the CPU's float32. That stays in a CPU's or GPU's
# last cache between decoding and multiplying, and is large enough that launching the dozen operations isn't what takes
# the time. 2880 is GPT-OSS's K, so its sums need no second pass, and 360 divides its 2880 and 5760 rows evenly.
TILE_ROWS = 360
TILE_K = 2880  # a multiple of the block of 32


class Tiled(Eager):
    """Decodes only the experts that tokens chose, tile by tile."""

    name = "tiled"

    @classmethod
    def why_not(cls, machine: Machine, shape: MoEShape) -> str | None:
        return None

    def prepare(self, weights: MoEWeights) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in vars(weights).items() if tensor is not None}

    def run(self, prepared: Prepared, segments: list[Segment], grouped: Grouped, x: Tensor, pairs: Tensor) -> None:
        """Deal the experts out to the streams that are asked for; the current stream goes on when all are done."""
        streams = _side_streams(x.device, settings.MOE_STREAMS.get()) if x.is_cuda else ()
        if not streams:
            super().run(prepared, segments, grouped, x, pairs)
        else:
            current = torch.cuda.current_stream(x.device)
            for stream in streams:
                stream.wait_stream(current)
                # The allocator must not hand these out again while the stream uses them, even if an error ends this
                # early.
                for tensor in (x, pairs, grouped.order, grouped.routing.token, grouped.routing.gate):
                    tensor.record_stream(stream)
            for turn, segment in enumerate(segments):
                with torch.cuda.stream(streams[turn % len(streams)]):
                    self.run_expert(prepared, segment, grouped, x, pairs)
            for stream in streams:
                current.wait_stream(stream)
        if x.is_cuda and settings.DEBUG_EMPTY_CACHE.get():
            torch.cuda.empty_cache()

    def answer(self, prepared: Prepared, expert: int, x: Tensor) -> Tensor:
        weights = MoEWeights(**prepared)
        hidden = matmul(x, weights.w13, weights.w13_scale, weights.w13_bias, expert)
        activated = activate(hidden, self.shape.activation).to(x.dtype)
        return matmul(activated, weights.w2, weights.w2_scale, weights.w2_bias, expert)


@lru_cache
def _side_streams(device: torch.device, count: int) -> tuple[torch.cuda.Stream, ...]:
    """The streams that experts are dealt to, made once; none if one is asked for, for that is the current stream."""
    return tuple(torch.cuda.Stream(device) for _ in range(count)) if count > 1 else ()


def matmul(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    """One expert's x bf16 [m, K] @ dequantize(codes uint8 [E, N, K/2], scales uint8 [E, N, K/32]).T + bias bf16 [E, N].

    -> float32 [m, N]. Decoding is exact and sums are kept in float32: nothing is rounded to BF16.
    """
    codes, scales = codes[expert], scales[expert]
    out = torch.zeros(x.shape[0], codes.shape[0], dtype=torch.float32, device=x.device)
    if bias is not None:
        out += bias[expert]
    x = x.to(x.dtype if x.is_cuda else torch.float32)
    for k in range(0, x.shape[1], TILE_K):
        x_tile = x[:, k : k + TILE_K]
        in_bytes, in_blocks = slice(k // 2, (k + TILE_K) // 2), slice(k // mxfp4.BLOCK, (k + TILE_K) // mxfp4.BLOCK)
        for row in range(0, codes.shape[0], TILE_ROWS):
            rows = slice(row, row + TILE_ROWS)
            _add_tile(out[:, rows], x_tile, codes[rows, in_bytes], scales[rows, in_blocks])
    return out


def _add_tile(out: Tensor, x: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Decode one tile and add x @ tile.T to out. A function of its own, so that the tile is gone before the next."""
    # Torch multiplies BF16 into float32 only on CUDA; on the CPU x came in float32, and so does the tile.
    tile = mxfp4.dequantize(codes, scales, x.dtype)
    if x.is_cuda:
        out += torch.mm(x, tile.T, out_dtype=torch.float32)
    else:
        out.addmm_(x, tile.T)
