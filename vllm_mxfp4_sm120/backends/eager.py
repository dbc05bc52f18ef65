# SPDX-License-Identifier: Apache-2.0
"""What the backends in plain torch share: tokens grouped by expert, one expert after the other, answers added up."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from vllm_mxfp4_sm120 import settings
from vllm_mxfp4_sm120.backends.base import Backend, Prepared
from vllm_mxfp4_sm120.routing import Grouped, Routing, Segment, local_ids


class Eager(Backend):
    """Runs only the experts that tokens chose."""

    capturable = False  # which experts to run depends on the data, and the host has to know
    compiled = False

    def forward(
        self,
        prepared: Prepared,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        expert_map: Tensor | None = None,
    ) -> Tensor:
        here = local_ids(topk_ids, self.shape.local_experts, expert_map)
        routing = Routing.from_topk(here, topk_weights)
        if settings.VALIDATE_GATE.get():
            routing.check_gates()
        grouped = routing.group()
        # A row for every chosen (token, expert) pair: no two experts add to the same place, so order can't change bits.
        pairs = torch.zeros(topk_ids.numel(), x.shape[1], dtype=torch.float32, device=x.device)
        self.run(prepared, [segment for segment in grouped.segments() if segment.expert >= 0], grouped, x, pairs)
        return pairs.view(*topk_ids.shape, x.shape[1]).sum(1).to(x.dtype)

    def run(self, prepared: Prepared, segments: list[Segment], grouped: Grouped, x: Tensor, pairs: Tensor) -> None:
        for segment in segments:
            self.run_expert(prepared, segment, grouped, x, pairs)

    def run_expert(self, prepared: Prepared, segment: Segment, grouped: Grouped, x: Tensor, pairs: Tensor) -> None:
        """Write one expert's share, its gates applied, to its rows of pairs float32 [M * k, H]."""
        rows = slice(segment.start, segment.stop)
        answer = self.answer(prepared, segment.expert, x[grouped.routing.token[rows]]).float()
        pairs.index_copy_(0, grouped.order[rows], answer.mul_(grouped.routing.gate[rows, None]))

    @abstractmethod
    def answer(self, prepared: Prepared, expert: int, x: Tensor) -> Tensor:
        """One expert's output [m, H], a new tensor, for x bf16 [m, H]."""
