# SPDX-License-Identifier: Apache-2.0
"""A backend by somebody else: it answers with the reference. `test_stranger.py` copies it into backends/."""

from __future__ import annotations

from torch import Tensor

from vllm_mxfp4_sm120.backends.base import Backend, Prepared
from vllm_mxfp4_sm120.moe import MoEShape, MoEWeights, reference
from vllm_mxfp4_sm120.platform import Machine


class Stranger(Backend):
    """The float64 reference, on any machine."""

    name = "stranger"
    capturable = False

    @classmethod
    def why_not(cls, machine: Machine, shape: MoEShape) -> str | None:
        return None

    def prepare(self, weights: MoEWeights) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in vars(weights).items() if tensor is not None}

    def forward(
        self, prepared: Prepared, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        weights = MoEWeights(**prepared)
        return reference(weights, x, topk_ids, topk_weights, self.shape.activation, expert_map).to(x.dtype)
