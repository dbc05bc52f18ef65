# SPDX-License-Identifier: Apache-2.0
"""Who goes where: (token, expert, gate) triples out of every form that routers hand out, grouped by expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_mxfp4_sm120 import envs
from vllm_mxfp4_sm120.moe import topk_softmax

# How far from 1 a token's gates may sum: rounding to BF16 moves each by up to 2^-8 of itself, and so their sum.
GATE_SUM_TOLERANCE = 1e-2

ACCEPTED = (
    "(indices, scores), topk_ids with topk_weights, token_ids with expert_ids and gates, "
    "or router_logits with a format of 'bypassed' and a top_k"
)


def local_ids(topk_ids: Tensor, local_experts: int, expert_map: Tensor | None = None) -> Tensor:
    """topk_ids [...] of any integer dtype and any value -> int64 [...]: the local expert, -1 where it isn't here.

    Not here is what lies outside 0 to num_experts - 1, and what expert_map [num_experts] sends outside 0 to
    local_experts - 1. Doesn't wait for the device. Raises RuntimeError for ids that aren't integers.
    """
    if topk_ids.is_floating_point() or topk_ids.is_complex() or topk_ids.dtype == torch.bool:
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

        Raises RuntimeError if they are not that, or if MXFP4_SM120_VALIDATE_GATE=1 finds gates that don't sum to 1.
        """
        if topk_ids.dim() != 2 or topk_ids.shape != topk_weights.shape:
            raise RuntimeError(
                f"routing: experts are {_describe(topk_ids)} and gates {_describe(topk_weights)}, "
                "expected both [tokens, k]; give one gate for each chosen expert"
            )
        num_tokens, top_k = topk_ids.shape
        token = torch.arange(num_tokens, device=topk_ids.device).repeat_interleave(top_k)
        return cls._checked(token, topk_ids.reshape(-1), topk_weights.reshape(-1), num_tokens)

    @classmethod
    def from_pairs(cls, token_ids: Tensor, expert_ids: Tensor, gates: Tensor, num_tokens: int | None = None) -> Routing:
        """token_ids and expert_ids [P], any integers, gates [P], any floats; in any order.

        Without `num_tokens` there are as many as the largest id says, which waits for the device.
        Raises as `from_topk`.
        """
        if token_ids.dim() != 1 or not token_ids.shape == expert_ids.shape == gates.shape:
            raise RuntimeError(
                f"routing: tokens are {_describe(token_ids)}, experts {_describe(expert_ids)} and gates "
                f"{_describe(gates)}, expected all [pairs]; give one of each for every pair"
            )
        if num_tokens is None:
            num_tokens = int(token_ids.max()) + 1 if token_ids.numel() else 0
        return cls._checked(token_ids, expert_ids, gates, num_tokens)

    @classmethod
    def from_logits(cls, router_logits: Tensor, top_k: int) -> Routing:
        """router_logits [M, E] of any float dtype, routed here as GPT-OSS does; gates come in the logits' dtype.

        Raises RuntimeError for logits or a top_k that can't be routed, and as `from_topk`.
        """
        if router_logits.dim() != 2 or not router_logits.is_floating_point():
            raise RuntimeError(
                f"routing: router_logits are {_describe(router_logits)}, expected floats [tokens, experts]"
            )
        if not 1 <= top_k <= router_logits.shape[1]:
            raise RuntimeError(
                f"routing: top_k is {top_k}, expected 1 to {router_logits.shape[1]}, the number of experts"
            )
        topk_ids, topk_weights = topk_softmax(router_logits, top_k)
        return cls.from_topk(topk_ids, topk_weights.to(router_logits.dtype))

    @classmethod
    def extract(cls, given: Any) -> Routing:
        """From whatever a router handed out, an object, a mapping or a pair:

        - router logits not routed yet, an object with `router_logits`, a `format` whose name is BYPASSED, and `top_k`
          or `topk_config.top_k` (as engines hand to FlashInfer's kernels, which route by themselves);
        - `topk_ids` [M, k] with `topk_weights` [M, k];
        - `token_ids` [P] with `expert_ids` [P] and `gates` [P], and `num_tokens` if the last tokens may have no expert;
        - a plain tuple (indices [M, k], scores [M, k]).
        Raises RuntimeError, naming what was given and what is accepted, for anything else.
        """
        if isinstance(given, cls):
            return given
        form = _get(given, "format")
        if form is not None and str(getattr(form, "name", form)).lower() == "bypassed":
            top_k = _get(given, "top_k")
            top_k = _get(_get(given, "topk_config"), "top_k") if top_k is None else top_k
            logits = _get(given, "router_logits")
            if isinstance(logits, Tensor) and isinstance(top_k, int):
                return cls.from_logits(logits, top_k)
        elif _tensors(given, "topk_ids", "topk_weights"):
            return cls.from_topk(_get(given, "topk_ids"), _get(given, "topk_weights"))
        elif _tensors(given, "token_ids", "expert_ids", "gates"):
            pairs = (_get(given, name) for name in ("token_ids", "expert_ids", "gates", "num_tokens"))
            return cls.from_pairs(*pairs)
        elif type(given) in (tuple, list) and len(given) == 2 and all(isinstance(part, Tensor) for part in given):
            return cls.from_topk(*given)
        raise RuntimeError(f"routing: given {_describe(given)}, expected {ACCEPTED}")

    @classmethod
    def _checked(cls, token: Tensor, expert: Tensor, gate: Tensor, num_tokens: int) -> Routing:
        for what, ids in (("tokens", token), ("experts", expert)):
            if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
                raise RuntimeError(
                    f"routing: {what} are {_describe(ids)}, expected integers; are ids and gates swapped?"
                )
        if not gate.is_floating_point():
            raise RuntimeError(f"routing: gates are {_describe(gate)}, expected floats; are ids and gates swapped?")
        routing = cls(token.long(), expert.long(), gate, num_tokens)
        if envs.VALIDATE_GATE.get():
            routing.check_gates()
        return routing

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


def _get(given: Any, name: str) -> Any:
    """A mapping's entry or an object's attribute, None where there is none."""
    return given.get(name) if isinstance(given, dict) else getattr(given, name, None)


def _tensors(given: Any, *names: str) -> bool:
    return all(isinstance(_get(given, name), Tensor) for name in names)


def _describe(given: Any) -> str:
    """What was given, in a few words: dtype and shape of a tensor, the type and the names in anything else."""
    if isinstance(given, Tensor):
        return f"{str(given.dtype).removeprefix('torch.')} {list(given.shape)}"
    if type(given) in (tuple, list):
        return f"a {type(given).__name__} of ({', '.join(map(_describe, given))})"
    names = given if isinstance(given, dict) else getattr(given, "_fields", None) or getattr(given, "__dict__", {})
    listed = f" with {', '.join(map(str, names))}" if names else ""
    form = _get(given, "format") if not isinstance(given, str) else None
    return f"{type(given).__name__}{listed}" + (
        f" in format {getattr(form, 'name', form)!r}" if form is not None else ""
    )
