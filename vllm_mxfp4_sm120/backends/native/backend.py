# SPDX-License-Identifier: Apache-2.0
"""The fastest backend, on every NVIDIA GPU from sm_80: the kernels of the CUDA library."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_mxfp4_sm120.backends.base import Backend, Prepared
from vllm_mxfp4_sm120.backends.native import library, tuning
from vllm_mxfp4_sm120.backends.native.layout import MAX_SCALE, MIN_SCALE, tile_experts
from vllm_mxfp4_sm120.moe import Activation, MoEShape, MoEWeights
from vllm_mxfp4_sm120.platform import Machine

# What computes every call where batches must not change an answer: it takes any number of tokens, and adds up along K
# in one order. Few tokens take longer than with the decode kernel, which cuts K.
ONE_KERNEL = "tokens64"


class Native(Backend):
    """Grouped kernels that decode MXFP4 in registers, from router logits to output in one to four launches."""

    name = "native"
    capturable = True
    has_router = True
    scale_range = (MIN_SCALE, MAX_SCALE)
    # Of the library's table; -1 takes what the device's rule says. `mxfp4-sm120 tune` times each.
    configuration = -1
    # (up to so many tokens, number of an FP4 kernel), ascending; None, and all beyond the last, is BF16 kernels'.
    # `vllm_mxfp4_sm120.fp4` decides.
    fp4_kernels: tuple[tuple[float, int | None], ...] = ()

    @classmethod
    def why_not(cls, machine: Machine, shape: MoEShape) -> str | None:
        if (reason := library.why_not(machine)) is not None:
            return reason
        if library.load() == "stub":
            return None
        limits = library.limits()
        for name, size in (("hidden", shape.hidden_size), ("intermediate", shape.intermediate_size)):
            if size % 32 or not 32 <= size <= limits.size:
                return f"{name} size {size} isn't a multiple of 32 up to {limits.size}"
        if shape.num_experts > limits.experts:
            return f"{shape.num_experts} experts are more than {limits.experts}"
        if shape.top_k > limits.top_k:
            return f"{shape.top_k} experts per token are more than {limits.top_k}"
        return None

    def __init__(self, shape: MoEShape) -> None:
        super().__init__(shape)
        library.load()  # where a proof runs, nobody has asked why_not

    def fix_kernel(self) -> bool:
        self.configuration = [each.name for each in library.configurations()].index(ONE_KERNEL)
        self.fp4_kernels = ()
        return True

    def prepare(self, weights: MoEWeights) -> dict[str, Tensor]:
        """Tiles of codes and scales, in place where `weights` came from `MoEWeights.empty`."""
        tuning.hand_over(weights.w13.device)
        prepared = {
            "w13": tile_experts(weights.w13, weights.w13_scale, "w13"),
            "w2": tile_experts(weights.w2, weights.w2_scale, "w2"),
        }
        if weights.w13_bias is not None:
            prepared["w13_bias"] = weights.w13_bias.contiguous()
        if weights.w2_bias is not None:
            prepared["w2_bias"] = weights.w2_bias.contiguous()
        return prepared

    def forward(
        self,
        prepared: Prepared,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        expert_map: Tensor | None = None,
    ) -> Tensor:
        ids, gates = _narrowed(topk_ids).contiguous(), topk_weights.float().contiguous()
        return self._layer(prepared, x, None, ids, gates, expert_map)

    def forward_logits(
        self, prepared: Prepared, x: Tensor, router_logits: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        if router_logits.dtype not in (torch.bfloat16, torch.float32):
            router_logits = router_logits.float()
        return self._layer(prepared, x, router_logits.contiguous(), None, None, expert_map)

    def router_logits(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits: Tensor = torch.ops.mxfp4_sm120.router_logits(x, weight, bias)
        return logits

    def _layer(
        self,
        prepared: Prepared,
        x: Tensor,
        router_logits: Tensor | None,
        topk_ids: Tensor | None,
        topk_weights: Tensor | None,
        expert_map: Tensor | None,
    ) -> Tensor:
        op, config = torch.ops.mxfp4_sm120.moe_layer, self.configuration
        if (kernel := self.fp4_kernel(x.shape[0])) is not None:
            op, config = torch.ops.mxfp4_sm120.fp4_moe_layer, kernel
        out: Tensor = op(
            x.contiguous(),
            prepared["w13"],
            prepared["w2"],
            prepared.get("w13_bias"),
            prepared.get("w2_bias"),
            router_logits,
            topk_ids,
            topk_weights,
            None if expert_map is None else _narrowed(expert_map).contiguous(),
            self.shape.num_experts,
            self.shape.top_k,
            self.shape.activation is Activation.SWIGLU_OAI,
            config,
        )
        return out

    def fp4_kernel(self, tokens: int) -> int | None:
        """Which FP4 kernel computes so many tokens, None where a BF16 kernel does."""
        for most, kernel in self.fp4_kernels:
            if tokens <= most:
                return kernel
        return None


def _narrowed(ids: Tensor) -> Tensor:
    """Integers as int32: none comes into the experts' range by that. What isn't integers is the op's to refuse."""
    if ids.dtype == torch.int64:
        ids = ids.clamp(-1, torch.iinfo(torch.int32).max)
    return ids if ids.is_floating_point() else ids.to(torch.int32)
