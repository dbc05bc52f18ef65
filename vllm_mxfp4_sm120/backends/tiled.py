"""Weight-only in plain torch: packed weights stay as they are, and one tile at a time is decoded and multiplied.

Slower than a fused kernel, but it needs nothing beyond torch and runs on CPU and CUDA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_mxfp4_sm120 import mxfp4
from vllm_mxfp4_sm120.backends.base import Backend, Prepared
from vllm_mxfp4_sm120.moe import MoEShape, MoEWeights, activate
from vllm_mxfp4_sm120.platform import Machine
from vllm_mxfp4_sm120.routing import Routing

# One decoded tile is TILE_ROWS x TILE_K values: 2 MiB in BF16, which any cache of interest holds, yet large enough that
# the dozen launches that decode and multiply it are not what takes the time. K is a multiple of the 32-value block.
TILE_ROWS = 512
TILE_K = 2048


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
        # Every (token, expert) pair has its own row, in grouped order, so that no two experts ever add to the same place.
        down = torch.zeros(topk_ids.numel(), x.shape[1], dtype=torch.float32, device=x.device)
        for segment in grouped.segments():
            if segment.expert >= 0:
                rows = slice(segment.start, segment.stop)
                self._expert(weights, segment.expert, x[grouped.routing.token[rows]], down[rows])
        down *= grouped.routing.gate.float()[:, None]
        pairs = torch.empty_like(down).index_copy_(0, grouped.order, down)
        return pairs.view(*topk_ids.shape, x.shape[1]).sum(1).to(x.dtype)

    def _expert(self, weights: MoEWeights, expert: int, x: Tensor, down: Tensor) -> None:
        """Add one expert's output for x bf16 [m, H] to down float32 [m, H]."""
        hidden = x.new_zeros(x.shape[0], weights.w13.shape[1], dtype=torch.float32)
        if weights.w13_bias is not None:
            hidden += weights.w13_bias[expert]
        add_matmul(hidden, x, weights.w13[expert], weights.w13_scale[expert])
        if weights.w2_bias is not None:
            down += weights.w2_bias[expert]
        activated = activate(hidden, self.shape.activation).to(x.dtype)
        add_matmul(down, activated, weights.w2[expert], weights.w2_scale[expert])


def add_matmul(out: Tensor, x: Tensor, codes: Tensor, scales: Tensor) -> None:
    """out float32 [m, N] += x bf16 [m, K] @ dequantize(codes uint8 [N, K/2], scales uint8 [N, K/32]).T, tile by tile.

    Decoding is exact and sums are kept in float32; nothing is rounded.
    """
    # Torch has a BF16 matmul with float32 results only on CUDA; on the CPU tiles are decoded to float32 instead.
    dtype = x.dtype if x.is_cuda else torch.float32
    x = x.to(dtype)
    for k in range(0, x.shape[1], TILE_K):
        x_tile = x[:, k : k + TILE_K]
        bytes_k, blocks_k = slice(k // 2, (k + TILE_K) // 2), slice(k // mxfp4.BLOCK, (k + TILE_K) // mxfp4.BLOCK)
        for row in range(0, codes.shape[0], TILE_ROWS):
            rows = slice(row, row + TILE_ROWS)
            tile = mxfp4.dequantize(codes[rows, bytes_k], scales[rows, blocks_k], dtype)
            if x.is_cuda:
                out[:, rows] += torch.mm(x_tile, tile.T, out_dtype=torch.float32)
            else:
                out[:, rows].addmm_(x_tile, tile.T)
