# SPDX-License-Identifier: Apache-2.0
"""Full upcast: every expert in BF16, dense. Only to compare with; it takes nearly four times the memory."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from vllm_mxfp4_sm120 import memory, mxfp4
from vllm_mxfp4_sm120.backends.base import Prepared
from vllm_mxfp4_sm120.backends.eager import Eager
from vllm_mxfp4_sm120.moe import MoEShape, MoEWeights, activate
from vllm_mxfp4_sm120.platform import Machine


class Upcast(Eager):
    """BF16 weights and matmuls, one expert after the other."""

    name = "upcast"

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

    def answer(self, prepared: Prepared, expert: int, x: Tensor) -> Tensor:
        bias13, bias2 = (prepared[name][expert] if name in prepared else None for name in ("w13_bias", "w2_bias"))
        hidden = linear(x, prepared["w13"][expert], bias13)
        activated = activate(hidden.float(), self.shape.activation).to(x.dtype)
        return linear(activated, prepared["w2"][expert], bias2)
