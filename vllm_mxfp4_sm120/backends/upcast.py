"""Full upcast: every expert in BF16, dense. Only to compare with; it takes nearly four times the memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from vllm_mxfp4_sm120 import memory, mxfp4
from vllm_mxfp4_sm120.backends.base import Backend, Prepared
from vllm_mxfp4_sm120.moe import MoEShape, MoEWeights, activate
from vllm_mxfp4_sm120.platform import Machine
from vllm_mxfp4_sm120.routing import Routing


class Upcast(Backend):
    """BF16 weights and matmuls, one expert after the other."""

    name = "upcast"
    capturable = False  # which experts to run depends on the data, and the host has to know
    compiled = False

    @classmethod
    def why_not(cls, machine: Machine, shape: MoEShape) -> str | None:
        return memory.why_no_upcast(machine, shape)

    def prepare(self, weights: MoEWeights) -> dict[str, Tensor]:
        memory.warn_upcast(self.shape)
        prepared = {
            "w13": mxfp4.dequantize(weights.w13, weights.w13_scale),
            "w2": mxfp4.dequantize(weights.w2, weights.w2_scale),
        }
        biases = {"w13_bias": weights.w13_bias, "w2_bias": weights.w2_bias}
        return prepared | {name: bias for name, bias in biases.items() if bias is not None}

    def forward(
        self,
        prepared: Prepared,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        expert_map: Tensor | None = None,
    ) -> Tensor:
        local_ids = topk_ids if expert_map is None else expert_map[topk_ids.long()]
        grouped = Routing.from_topk(local_ids, topk_weights).group()
        pairs = torch.zeros(topk_ids.numel(), x.shape[1], dtype=torch.float32, device=x.device)
        for segment in grouped.segments():
            if segment.expert >= 0:
                rows = slice(segment.start, segment.stop)
                answer = self._expert(prepared, segment.expert, x[grouped.routing.token[rows]])
                pairs[grouped.order[rows]] = answer.float() * grouped.routing.gate[rows, None].float()
        return pairs.view(*topk_ids.shape, x.shape[1]).sum(1).to(x.dtype)

    def _expert(self, prepared: Prepared, expert: int, x: Tensor) -> Tensor:
        """One expert's output bf16 [m, H] for x bf16 [m, H]."""
        bias13, bias2 = (prepared[name][expert] if name in prepared else None for name in ("w13_bias", "w2_bias"))
        hidden = linear(x, prepared["w13"][expert], bias13)
        activated = activate(hidden.float(), self.shape.activation).to(x.dtype)
        return linear(activated, prepared["w2"][expert], bias2)
