# SPDX-License-Identifier: Apache-2.0
"""One GPT-OSS mixture-of-experts layer: its sizes, its packed weights, and its mathematics, written once.

Every backend computes what `reference` computes; `reference` runs in any floating dtype, float64 included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from vllm_mxfp4_sm120 import mxfp4

# GPT-OSS's SwiGLU: gate * sigmoid(1.702 gate) * (up + 1), gate <= 7, |up| <= 7 (openai/gpt-oss, `swiglu`).
SWIGLU_ALPHA = 1.702
SWIGLU_LIMIT = 7.0


class Activation(StrEnum):
    """What stands between the two GEMMs: GPT-OSS's clamped SwiGLU, or plain silu(gate) * up."""

    SWIGLU_OAI = "swiglu_oai"
    SILU = "silu"


@dataclass(frozen=True)
class MoEShape:
    """Sizes of one layer as one rank holds it.

    `num_experts` is the router's width; `local_experts` of them live here (fewer under expert parallelism).
    `intermediate_size` is this rank's shard (I / TP). All sizes count elements.
    """

    num_experts: int
    local_experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int
    has_bias: bool = True
    activation: Activation = Activation.SWIGLU_OAI

    def __post_init__(self) -> None:
        """Raises ValueError for a layer that has no meaning: no experts, or more chosen or local than there are."""
        if self.num_experts < 1:
            raise ValueError(f"a layer of {self.num_experts} experts, expected at least 1")
        if not 0 <= self.local_experts <= self.num_experts:
            raise ValueError(f"{self.local_experts} local experts of {self.num_experts}, expected 0 to all of them")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"{self.top_k} experts per token of {self.num_experts}, expected 1 to {self.num_experts}")

    @property
    def packed_bytes_per_expert(self) -> int:
        """Bytes of one expert's packed weights and scales, without biases: 17 bytes for every 32 values."""
        return 3 * self.intermediate_size * self.hidden_size * 17 // 32


@dataclass
class MoEWeights:
    """One layer's experts in the checkpoint's own layout (E local experts, H hidden, I intermediate).

    w13 uint8 [E, 2I, H/2], rows gate, up, gate, up...; w13_scale uint8 [E, 2I, H/32]; w13_bias bf16 [E, 2I] or None;
    w2 uint8 [E, H, I/2]; w2_scale uint8 [E, H, I/32]; w2_bias bf16 [E, H] or None.
    """

    w13: Tensor
    w13_scale: Tensor
    w2: Tensor
    w2_scale: Tensor
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None

    @classmethod
    def empty(cls, shape: MoEShape, device: torch.device | str) -> MoEWeights:
        """Zeroed weights to load into.

        Each expert's codes and scales share one contiguous run of bytes, codes first, so that a backend whose layout
        interleaves the two can rearrange each expert in place: loading then never needs a second copy of a layer.
        """
        h, i = shape.hidden_size, shape.intermediate_size

        def arena(rows: int, k: int) -> tuple[Tensor, Tensor]:
            flat = torch.zeros(shape.local_experts, rows * k // 32 * 17, dtype=torch.uint8, device=device)
            codes, scales = flat[:, : rows * k // 2], flat[:, rows * k // 2 :]
            return codes.unflatten(1, (rows, k // 2)), scales.unflatten(1, (rows, k // 32))

        w13, w13_scale = arena(2 * i, h)
        w2, w2_scale = arena(h, i)
        bias = shape.has_bias
        return cls(
            w13,
            w13_scale,
            w2,
            w2_scale,
            torch.zeros(shape.local_experts, 2 * i, dtype=torch.bfloat16, device=device) if bias else None,
            torch.zeros(shape.local_experts, h, dtype=torch.bfloat16, device=device) if bias else None,
        )

    def by_checkpoint_name(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Codes and scales by what a checkpoint calls them, for messages."""
        return {"gate_up_proj": (self.w13, self.w13_scale), "down_proj": (self.w2, self.w2_scale)}

    def scale_outside(self, low: int = 0, high: int = mxfp4.NAN_SCALE - 1) -> str | None:
        """The first block whose scale isn't `low` to `high`, as "down_proj_scales[3, 5, 1] is 42"; None if all are.

        A block of zeros may have any scale but NaN. Reads each tensor of scales once and waits for the device once,
        unless a scale lies outside. Raises ValueError for a scale of 255, NaN.
        """
        named = self.by_checkpoint_name()
        if not all(scales.numel() for _, scales in named.values()):
            return None
        extremes = torch.stack([extreme for _, scales in named.values() for extreme in scales.aminmax()]).tolist()
        if low <= min(extremes) and max(extremes) <= high:
            return None
        if mxfp4.NAN_SCALE in extremes:
            low, high = 0, mxfp4.NAN_SCALE - 1
        for name, (codes, scales) in named.items():
            if (block := mxfp4.first_outside(codes, scales, low, high)) is not None:
                where, code = f"{name}_scales{list(block)}", int(scales[block])
                if code == mxfp4.NAN_SCALE:
                    raise ValueError(
                        f"{where} is 255 (NaN), expected 0 to 254; the checkpoint is damaged, fetch it again"
                    )
                return f"{where} is {code}"
        return None

    def clone(self) -> MoEWeights:
        """A copy, for `prepare` consumes its weights."""
        return replace(self, **{name: tensor.clone() for name, tensor in vars(self).items() if tensor is not None})


def topk_softmax(router_logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """GPT-OSS's routing: the k largest logits, then a softmax over just those.

    router_logits [M, E] of any floating dtype -> topk_ids int64 [M, k], topk_weights float32 [M, k]. Of equal logits
    the lower id comes first. NaN is larger than any number, as in torch.topk, and makes all gates of its token NaN; so
    do +infinity and a choice of nothing but -infinity, for the softmax subtracts the largest.
    """
    logits = router_logits.float()
    # On GPUs torch sorts a NaN with its sign bit set below all numbers, on CPUs above.
    values, ids = logits.masked_fill(logits.isnan(), torch.nan).sort(dim=-1, descending=True, stable=True)
    return ids[:, :top_k], values[:, :top_k].softmax(dim=-1)


def activate(gate_up: Tensor, activation: Activation) -> Tensor:
    """[..., 2I] with gate and up interleaved -> [..., I], in the input's dtype."""
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    if activation is Activation.SILU:
        return gate * torch.sigmoid(gate) * up
    gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)


def reference(
    weights: MoEWeights,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    activation: Activation = Activation.SWIGLU_OAI,
    expert_map: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    activation_dtype: torch.dtype | None = None,
) -> Tensor:
    """The layer's output [M, H] in `dtype`; slow, for tests and self-tests.

    Nothing is rounded on the way, or only the activation between the GEMMs, to `activation_dtype`: backends round it to
    BF16, which alone makes a relative error of 1.65e-3.

    topk_ids [M, k] are global expert ids; expert_map int [num_experts] gives the local id, or -1 where the expert
    lives elsewhere (its share is left out, as expert parallelism sums over ranks). So is the share of any id, or local
    id, that no expert has.
    """
    local_experts = weights.w2.shape[0]
    out = torch.zeros(x.shape[0], weights.w2.shape[1], dtype=dtype, device=x.device)
    for expert in topk_ids.unique().tolist():
        local = expert
        if expert_map is not None:
            local = int(expert_map[expert]) if 0 <= expert < len(expert_map) else -1
        if not 0 <= local < local_experts:
            continue
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        w13 = mxfp4.dequantize(weights.w13[local], weights.w13_scale[local], dtype)
        hidden = x[token].to(dtype) @ w13.T
        if weights.w13_bias is not None:
            hidden += weights.w13_bias[local].to(dtype)
        w2 = mxfp4.dequantize(weights.w2[local], weights.w2_scale[local], dtype)
        act = activate(hidden, activation)
        if activation_dtype is not None:
            act = act.to(activation_dtype).to(dtype)
        down = act @ w2.T
        if weights.w2_bias is not None:
            down += weights.w2_bias[local].to(dtype)
        out.index_add_(0, token, down * topk_weights[token, slot].to(dtype)[:, None])
    return out
