"""Who goes where: (token, expert, gate) triples, extracted from every format that routers hand out, and grouped by expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """P chosen (token, expert) pairs of `num_tokens` tokens: token int64 [P], expert int64 [P], gate [P] as given."""

    token: Tensor
    expert: Tensor
    gate: Tensor
    num_tokens: int

    @classmethod
    def from_topk(cls, topk_ids: Tensor, topk_weights: Tensor) -> Routing:
        """topk_ids [M, k] of any integer dtype, topk_weights [M, k]; pair p is token p // k, slot p % k."""
        tokens, top_k = topk_ids.shape
        token = torch.arange(tokens, device=topk_ids.device).repeat_interleave(top_k)
        return cls(token, topk_ids.reshape(-1).long(), topk_weights.reshape(-1), tokens)

    def group(self) -> Grouped:
        """Sort the pairs by expert, stably: the order within an expert, and so every bit, is the same on every run."""
        expert, order = self.expert.sort(stable=True)
        return Grouped(Routing(self.token[order], expert, self.gate[order], self.num_tokens), order)


@dataclass(frozen=True)
class Segment:
    """One expert's pairs: rows [start, stop) of the grouped routing."""

    expert: int
    start: int
    stop: int


@dataclass(frozen=True)
class Grouped:
    """A routing whose pairs lie expert by expert; `order` int64 [P] is each pair's place before the sort."""

    routing: Routing
    order: Tensor

    def segments(self) -> list[Segment]:
        """The experts that were chosen, ascending, each with its rows. Waits for the device: the host must know them."""
        experts, counts = self.routing.expert.unique_consecutive(return_counts=True)
        segments, start = [], 0
        for expert, count in torch.stack((experts, counts)).T.tolist():
            segments.append(Segment(expert, start, start + count))
            start += count
        return segments
