# SPDX-License-Identifier: Apache-2.0
"""Cases: a layer and a call of it, small enough to read, and the tensors that follow from them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from vllm_mxfp4_sm120.backends.base import Backend
from vllm_mxfp4_sm120.moe import Activation, MoEShape, MoEWeights, topk_softmax

# What a field may be, the plainest first: shrinking tries to get there.
LOCAL = ("all", "every other", "first", "last", "shuffled", "none chosen")
ROUTING = ("uniform", "skewed", "one expert", "equal logits")
SCALES = ("ordinary", "rows", "blocks", "low", "high", "zero blocks", "whole range", "any")
BIAS = ("ordinary", "none", "large")
ACTIVATIONS = ("ordinary", "outlier columns", "large and tiny tokens", "zero tokens", "NaN", "infinity", "NaN logits")
IDS = ("int32", "int64", "out of range int32", "out of range int64", "repeated int32")
PATHS = ("routed", "logits", "float logits")
KINDS = {
    "local": LOCAL,
    "routing": ROUTING,
    "scales": SCALES,
    "bias": BIAS,
    "x": ACTIVATIONS,
    "ids": IDS,
    "path": PATHS,
    "activation": tuple(activation.value for activation in Activation),
}

# GPT-OSS's I over 2 and 4 ranks, in blocks of 32, and sizes around what kernels take at once.
BLOCKS = (1, 2, 3, 4, 5, 7, 8, 9, 11, 16, 17)
SHARD_BLOCKS = (1440 // 32, 736 // 32, 672 // 32)
EXPERTS = (1, 2, 3, 4, 5, 8, 11, 16, 20, 32, 40, 61, 128, 256)
MOST_WEIGHTS = 3_000_000  # in all experts together: a case is milliseconds


@dataclass(frozen=True)
class Case:
    """A layer, its weights and its input by kind; every tensor follows from these and the seed."""

    seed: int
    hidden_blocks: int = 1
    intermediate_blocks: int = 1
    experts: int = 1
    top_k: int = 1
    tokens: int = 1
    local: str = LOCAL[0]
    activation: str = Activation.SWIGLU_OAI.value
    routing: str = ROUTING[0]
    scales: str = SCALES[0]
    bias: str = BIAS[0]
    x: str = ACTIVATIONS[0]
    ids: str = IDS[0]
    path: str = PATHS[0]

    @classmethod
    def draw(cls, seed: int, shapes_of: int | None = None, most_tokens: int = 300) -> Case:
        """Any case. `shapes_of` draws the layer's shape from another seed, for backends that compile for each shape."""
        choose = random.Random(seed if shapes_of is None else shapes_of)
        experts, hidden, intermediate = MOST_WEIGHTS, 1, 1
        while experts * hidden * intermediate * 3 * 1024 > MOST_WEIGHTS:
            experts, hidden = choose.choice(EXPERTS), choose.choice(BLOCKS)
            intermediate = choose.choice(BLOCKS + SHARD_BLOCKS)
        shape: dict[str, Any] = {
            "hidden_blocks": hidden,
            "intermediate_blocks": intermediate,
            "experts": experts,
            "top_k": choose.randint(1, min(8, experts)),
            "activation": choose.choice((*Activation, Activation.SWIGLU_OAI)).value,
        }
        choose = random.Random(seed)

        def kind(field: str) -> str:
            """The plain one in half of the cases: one oddity mustn't always come with the others."""
            return KINDS[field][0] if choose.random() < 0.5 else choose.choice(KINDS[field])

        return cls(
            seed,
            **shape,
            tokens=choose.choice((0, 1, 1, 2, 3, 5, 8, 9, 20, 33, 64, 70, 150, most_tokens)),
            **{field: kind(field) for field in ("local", "routing", "scales", "bias", "x", "ids")},
            path=choose.choice(("routed", *PATHS)),
        )

    @property
    def shape(self) -> MoEShape:
        return MoEShape(
            num_experts=self.experts,
            local_experts=self.experts if self.local == "all" else len(self.local_experts),
            hidden_size=32 * self.hidden_blocks,
            intermediate_size=32 * self.intermediate_blocks,
            top_k=self.top_k,
            has_bias=self.bias != "none",
            activation=Activation(self.activation),
        )

    @property
    def local_experts(self) -> list[int]:
        """Global ids of the experts that live here, in the order of their local ids."""
        every = list(range(self.experts))
        some = {
            "every other": every[1::2],
            "first": every[: -(-self.experts // 3)],
            "last": every[-1:],
            "shuffled": random.Random(self.seed).sample(every, -(-self.experts // 2)),
            "none chosen": every[:1],
        }
        return some.get(self.local, every) or every

    def tensors(self) -> Tensors:
        """Drawn on the CPU, so that a case is the same for every device."""
        return Tensors.of(self, torch.Generator().manual_seed(self.seed))


@dataclass
class Tensors:
    """Of one case. `logits` are None where ids and gates are given, whatever a router would say."""

    weights: MoEWeights
    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    logits: Tensor | None
    expert_map: Tensor | None

    @classmethod
    def of(cls, case: Case, generator: torch.Generator) -> Tensors:
        shape = case.shape
        x, logits = _x(case, generator), _logits(case, generator)
        ids, gates = topk_softmax(logits, case.top_k)
        if case.path == "routed":  # gates needn't sum to 1
            ids, gates = _ids(case, ids, generator), gates * (torch.rand(gates.shape, generator=generator) + 0.5)
        expert_map = None
        if case.local != "all":
            expert_map = torch.full((case.experts,), -1, dtype=torch.int32)
            expert_map[case.local_experts] = torch.arange(shape.local_experts, dtype=torch.int32)
        weights = _weights(case, shape, generator)
        return cls(weights, x, ids, gates, None if case.path == "routed" else logits, expert_map)

    def to(self, device: torch.device | str) -> Tensors:
        if torch.device(device).type == "cpu":
            return self
        weights = MoEWeights(**{name: t if t is None else t.to(device) for name, t in vars(self.weights).items()})
        moved = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, weights=weights, **moved)

    def flip(self) -> Tensors:
        """The same tokens in the opposite order."""
        logits = None if self.logits is None else self.logits.flip(0)
        flipped = {name: getattr(self, name).flip(0) for name in ("x", "topk_ids", "topk_weights")}
        return replace(self, logits=logits, **flipped)

    def run(self, layer: Backend, prepared: Any) -> Tensor:
        """The backend's answer, by the path that the case takes."""
        if self.logits is None:
            return layer.forward(prepared, self.x, self.topk_ids, self.topk_weights, self.expert_map)
        return layer.forward_logits(prepared, self.x, self.logits, self.expert_map)


def _x(case: Case, generator: torch.Generator) -> Tensor:
    tokens, hidden = case.tokens, 32 * case.hidden_blocks
    x = torch.randn(tokens, hidden, generator=generator)
    some = torch.rand(tokens, generator=generator) < 0.3
    if case.x == "outlier columns":
        columns = torch.randint(0, hidden, (max(1, hidden // 64),), generator=generator)
        x[:, columns] *= torch.randint(10, 21, (len(columns),), generator=generator).float().exp2()
    elif case.x == "large and tiny tokens":
        x *= torch.randint(-20, 21, (tokens, 1), generator=generator).float().exp2()
    elif case.x == "zero tokens":
        x[some] = 0
    elif case.x in ("NaN", "infinity"):
        column = torch.randint(0, hidden, (tokens,), generator=generator)
        sign = torch.randint(0, 2, (tokens,), generator=generator).float() * 2 - 1
        value = sign * (math.nan if case.x == "NaN" else math.inf)
        x[some.nonzero()[:, 0], column[some]] = value[some]
    return x.bfloat16()


def _logits(case: Case, generator: torch.Generator) -> Tensor:
    logits = torch.randn(case.tokens, case.experts, generator=generator)
    if case.routing == "skewed":
        logits += torch.linspace(6, 0, case.experts)
    elif case.routing == "one expert":
        logits[:, int(torch.randint(0, case.experts, (), generator=generator))] = 9
    elif case.routing == "equal logits":
        logits = logits.round() + 0.0  # no -0: whether that is 0 is the backend's affair
    if case.local == "none chosen" and case.experts > case.top_k:
        logits[:, case.local_experts[0]] = -99
    if case.x == "NaN logits" and case.tokens:
        odd = torch.tensor([math.nan, -math.nan, math.inf, -math.inf])
        for token in (torch.rand(case.tokens, generator=generator) < 0.3).nonzero()[:, 0].tolist():
            some = torch.randint(0, case.experts, (1 + token % 3,), generator=generator)
            logits[token, some] = odd[torch.randint(0, 4, (len(some),), generator=generator)]
    return logits if case.path == "float logits" else logits.bfloat16()


def _ids(case: Case, ids: Tensor, generator: torch.Generator) -> Tensor:
    wide = case.ids.endswith("int64")
    if case.ids.startswith("out of range"):
        # Any that count from the end where negative indices do, any that are in range once narrowed.
        odd = [
            -1,
            -case.experts,
            -(case.experts // 2) - 1,
            -65536,
            -65535,
            -32768,
            65535,
            65536,
            2**31 - 1,
            -(2**31),
            case.experts,
            case.experts + 7,
        ]
        if wide:
            odd += [2**32, 2**32 + 1, -(2**32), 2**63 - 1, -(2**63)]
        value = torch.tensor(odd)[torch.randint(0, len(odd), ids.shape, generator=generator)]
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, value, ids)
    if case.ids == "repeated int32":  # some tokens choose their first expert twice
        some = torch.rand(len(ids), generator=generator) < 0.5
        ids[some, -1] = ids[some, 0]
    return ids if wide else ids.int()


def _weights(case: Case, shape: MoEShape, generator: torch.Generator) -> MoEWeights:
    weights = MoEWeights.empty(shape, "cpu")
    for codes, scales, k in (
        (weights.w13, weights.w13_scale, shape.hidden_size),
        (weights.w2, weights.w2_scale, shape.intermediate_size),
    ):
        codes.copy_(torch.randint(0, 256, codes.shape, dtype=torch.uint8, generator=generator))
        # Codes have a standard deviation near 3: with this scale a product's outputs are 1 to 2.
        middle = 127 - round(math.log2(3 * math.sqrt(k)))
        near = torch.randint(-1, 2, scales.shape, generator=generator)
        scales.copy_(SCALE_KINDS[case.scales](middle, near, generator).to(torch.uint8))
        if case.scales == "zero blocks":
            zero = torch.rand(scales.shape, generator=generator) < 0.2
            codes.unflatten(-1, (-1, 16))[zero] &= 0x88
            scales[zero] = torch.randint(0, 255, (int(zero.sum()),), dtype=torch.uint8, generator=generator)
    for bias in (weights.w13_bias, weights.w2_bias):
        if bias is not None:
            value = torch.randn(bias.shape, generator=generator) * 0.5
            if case.bias == "large":  # some columns far from their neighbours
                value *= torch.randint(0, 5, bias.shape, generator=generator).eq(0) * 2.0**12 + 1
            bias.copy_(value)
    return weights


def _between(low: int, high: int) -> Callable[[int, Tensor, torch.Generator], Tensor]:
    """Any scale for any block, and the highest somewhere in each row.

    So a token's outputs lie within 2^20 of each other, here and below: kernels may let neighbours share an exponent.
    """

    def draw(middle: int, near: Tensor, generator: torch.Generator) -> Tensor:
        scales = torch.randint(low, high + 1, near.shape, generator=generator)
        highest = torch.randint(0, near.shape[2], (*near.shape[:2], 1), generator=generator)
        return scales.scatter_(2, highest, high)

    return draw


def _window(middle: int, near: Tensor, generator: torch.Generator) -> Tensor:
    low = int(torch.randint(0, 235, (), generator=generator))
    return torch.randint(low, low + 20, near.shape, generator=generator)


def _rows(middle: int, near: Tensor, generator: torch.Generator) -> Tensor:
    """Each row on a level of its own, so that a column of the output is up to 2^20 times its neighbour."""
    return middle + near + torch.randint(-10, 11, (*near.shape[:2], 1), generator=generator)


SCALE_KINDS: dict[str, Callable[[int, Tensor, torch.Generator], Tensor]] = {
    "ordinary": lambda middle, near, generator: middle + near,
    "rows": _rows,
    "blocks": _between(100, 140),
    "low": _between(43, 60),
    "high": _between(150, 176),
    "zero blocks": lambda middle, near, generator: middle + near,
    # A backend says no to these, or is right.
    "whole range": _between(43, 176),
    "any": _window,
}


def simpler(case: Case) -> list[Case]:
    """Cases that are plainer by one step, the largest steps first."""
    found = []
    for field, kinds in KINDS.items():
        now = kinds.index(getattr(case, field))
        found += [{field: kind} for kind in kinds[:now]]
    for field in ("experts", "tokens", "intermediate_blocks", "hidden_blocks", "top_k"):
        now, least = getattr(case, field), 0 if field == "tokens" else 1
        found += [{field: size} for size in sorted({least, now // 2, now - 1}) if least <= size < now]
    return [replace(case, **{"top_k": min(case.top_k, new.get("experts", case.experts))} | new) for new in found]


def from_json(given: dict[str, Any]) -> Case:
    return Case(**{field.name: given[field.name] for field in fields(Case)})
