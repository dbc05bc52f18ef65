"""Weight-only in plain torch: packed weights stay as they are, and one tile at a time is decoded and multiplied.

Slower than a fused kernel, but it needs nothing beyond torch and runs on CPU and CUDA.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from vllm_mxfp4_sm120 import envs, mxfp4
from vllm_mxfp4_sm120.backends.base import Backend, Prepared
from vllm_mxfp4_sm120.moe import MoEShape, MoEWeights, activate
from vllm_mxfp4_sm120.platform import Machine
from vllm_mxfp4_sm120.routing import Grouped, Routing, Segment

# A decoded tile is TILE_ROWS x TILE_K values: 2 MB in BF16, 4 MB in the CPU's float32. That stays in a CPU's or GPU's
# last cache between decoding and multiplying, and is large enough that launching the dozen operations isn't what takes
# the time. 2880 is GPT-OSS's K, so its sums need no second pass, and 360 divides its 2880 and 5760 rows evenly.
TILE_ROWS = 360
TILE_K = 2880  # a multiple of the block of 32


class Tiled(Backend):
    """Decodes only the experts that tokens chose, tile by tile."""

    name = "tiled"
    capturable = False  # which experts to decode depends on the data, and the host has to know
    compiled = False

    @classmethod
    def why_not(cls, machine: Machine, shape: MoEShape) -> str | None:
        return None

    def prepare(self, weights: MoEWeights) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in vars(weights).items() if tensor is not None}

    def forward(
        self,
        prepared: Prepared,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        expert_map: Tensor | None = None,
    ) -> Tensor:
        weights = MoEWeights(**prepared)
        local_ids = topk_ids if expert_map is None else expert_map[topk_ids.long()]
        grouped = Routing.from_topk(local_ids, topk_weights).group()
        # A row for every chosen (token, expert) pair: no two experts add to the same place, so order can't change bits.
        pairs = torch.zeros(topk_ids.numel(), x.shape[1], dtype=torch.float32, device=x.device)
        segments = [segment for segment in grouped.segments() if segment.expert >= 0]
        streams = _side_streams(x.device, envs.MOE_STREAMS.get()) if x.is_cuda else ()
        if not streams:
            for segment in segments:
                self._expert(weights, segment, grouped, x, pairs)
        else:
            self._on_streams(streams, weights, segments, grouped, x, pairs)
        out = pairs.view(*topk_ids.shape, x.shape[1]).sum(1).to(x.dtype)
        if x.is_cuda and envs.DEBUG_EMPTY_CACHE.get():
            torch.cuda.empty_cache()
        return out

    def _on_streams(
        self,
        streams: tuple[torch.cuda.Stream, ...],
        weights: MoEWeights,
        segments: list[Segment],
        grouped: Grouped,
        x: Tensor,
        pairs: Tensor,
    ) -> None:
        """Deal the experts out to the streams; the current stream goes on when all are done."""
        current = torch.cuda.current_stream(x.device)
        for stream in streams:
            stream.wait_stream(current)
            # The allocator must not hand these out again while the stream uses them, even if an error ends this early.
            for tensor in (x, pairs, grouped.order, grouped.routing.token, grouped.routing.gate):
                tensor.record_stream(stream)
        for turn, segment in enumerate(segments):
            with torch.cuda.stream(streams[turn % len(streams)]):
                self._expert(weights, segment, grouped, x, pairs)
        for stream in streams:
            current.wait_stream(stream)

    def _expert(self, weights: MoEWeights, segment: Segment, grouped: Grouped, x: Tensor, pairs: Tensor) -> None:
        """Write one expert's share, its gates applied, to its rows of pairs float32 [M * k, H]."""
        expert, rows = segment.expert, slice(segment.start, segment.stop)
        hidden = matmul(x[grouped.routing.token[rows]], weights.w13, weights.w13_scale, weights.w13_bias, expert)
        activated = activate(hidden, self.shape.activation).to(x.dtype)
        down = matmul(activated, weights.w2, weights.w2_scale, weights.w2_bias, expert)
        pairs.index_copy_(0, grouped.order[rows], down.mul_(grouped.routing.gate[rows, None]))


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
