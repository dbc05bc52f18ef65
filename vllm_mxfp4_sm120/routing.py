# SPDX-License-Identifier: Apache-2.0
"""Who goes where: (token, expert, gate) triples, grouped by expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# How far from 1 a token's gates may sum: rounding to BF16 moves each by up to 2^-8 of itself, and so their sum.
GATE_SUM_TOLERANCE = 1e-2


def local_ids(topk_ids: Tensor, local_experts: int, expert_map: Tensor | None = None) -> Tensor:
    """topk_ids [...] of any integer dtype and any value -> int64 [...]: the local expert, -1 where it isn't here.

    Not here is what lies outside 0 to num_experts - 1, and what expert_map [num_experts] sends outside 0 to
    local_experts - 1. Doesn't wait for the device. Raises RuntimeError for ids that aren't integers.
    """
    if _kind(topk_ids) != "integers":
        raise RuntimeError(f"routing: experts are {_describe(topk_ids)}, expected integers; are ids and gates swapped?")
    ids = topk_ids.long()
    if expert_map is not None:
        known = (ids >= 0) & (ids < expert_map.numel())
        ids = torch.where(known, expert_map[torch.where(known, ids, 0)].long(), -1)
    return torch.where((ids >= 0) & (ids < local_experts), ids, -1)


@dataclass(frozen=True)
class Routing:
    """P pairs of a token and an expert that it chose, among `num_tokens` tokens.

    token int64 [P], expert int64 [P] (below zero: not here, as an expert map says), gate [P] in the dtype it came in.
    """

    token: Tensor
    expert: Tensor
    gate: Tensor
    num_tokens: int

    @classmethod
    def from_topk(cls, topk_ids: Tensor, topk_weights: Tensor) -> Routing:
        """topk_ids [M, k], any integers, topk_weights [M, k], any floats: pair p is token p // k, slot p % k.

        Raises RuntimeError if they are not that.
        """
        if topk_ids.dim() != 2 or topk_ids.shape != topk_weights.shape:
            raise RuntimeError(
                f"routing: experts are {_describe(topk_ids)} and gates {_describe(topk_weights)}, "
                "expected both [tokens, k]; give one gate for each chosen expert"
            )
        for what, tensor, kind in (("experts", topk_ids, "integers"), ("gates", topk_weights, "floats")):
            if _kind(tensor) != kind:
                raise RuntimeError(
                    f"routing: {what} are {_describe(tensor)}, expected {kind}; are ids and gates swapped?"
                )
        num_tokens, top_k = topk_ids.shape
        token = torch.arange(num_tokens, device=topk_ids.device).repeat_interleave(top_k)
        return cls(token, topk_ids.reshape(-1).long(), topk_weights.reshape(-1), num_tokens)

    def check_gates(self) -> None:
        """Raises RuntimeError if any token's gates don't sum to 1. Waits for the device."""
        sums = self.gate.new_zeros(self.num_tokens, dtype=torch.float32).index_add_(0, self.token, self.gate.float())
        wrong = ~((sums - 1).abs() <= GATE_SUM_TOLERANCE)  # NaN is wrong too
        if bool(wrong.any()):
            token, off = int(wrong.nonzero()[0]), int(wrong.sum())
            raise RuntimeError(
                f"routing: the gates of token {token} sum to {sums[token].item():.4g} ({off} of {self.num_tokens} "
                f"tokens are off), expected 1 within {GATE_SUM_TOLERANCE}; normalise over the chosen experts"
            )

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
        """The experts that were chosen, ascending, each with its rows. Waits for the device: the host must know."""
        experts, counts = self.routing.expert.unique_consecutive(return_counts=True)
        segments, start = [], 0
        for expert, count in torch.stack((experts, counts), dim=1).tolist():
            segments.append(Segment(expert, start, start + count))
            start += count
        return segments


def _kind(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "floats"
    return "others" if tensor.is_complex() or tensor.dtype == torch.bool else "integers"


def _describe(tensor: Tensor) -> str:
    """Dtype and shape."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
