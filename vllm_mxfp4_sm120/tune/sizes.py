# SPDX-License-Identifier: Apache-2.0
"""What to time: sizes around each border of a rule, and which kernels may compute them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from vllm_mxfp4_sm120.backends.tuning import Bound, Rule
from vllm_mxfp4_sm120.moe import MoEShape

# Around a border: some 15 % apart, as far as its neighbours. Just beyond it another kernel's range begins.
FACTORS = (0.7, 0.85, 1.0, 1.2, 1.45)
# Where decoding happens, whatever the rule is.
ALWAYS = (1, 2, 4)


@dataclass(frozen=True, order=True)
class Size:
    """A call to time: so many tokens through a layer of `model`, which are `tokens_per_expert` on average."""

    model: str
    tokens: int
    experts: int
    top_k: int

    @property
    def tokens_per_expert(self) -> float:
        return self.tokens * self.top_k / self.experts

    def smaller(self) -> Size:
        """One token less."""
        return Size(self.model, self.tokens - 1, self.experts, self.top_k)

    def along(self, field: str) -> float:
        """Its place on the axis of a bound, "tokens" or "tokens_per_expert"."""
        return float(self.tokens if field == "tokens" else self.tokens_per_expert)


def around(rule: Rule, model: str, shape: MoEShape, most: int) -> list[Size]:
    """The sizes of a model that tell whether the rule's borders lie right, up to so many tokens."""
    tokens = {*ALWAYS, most}
    for bound in rule:
        for border in borders(bound, shape):
            tokens |= {math.floor(border * factor) for factor in FACTORS} | {math.floor(border) + 1}
    return [Size(model, each, shape.num_experts, shape.top_k) for each in sorted(tokens) if 1 <= each <= most]


def grid(model: str, shape: MoEShape, first: int, last: int) -> list[Size]:
    """Sizes of a model between two, 19 % apart: four for each doubling."""
    steps = range(math.ceil(4 * math.log2(last / first)) + 1)
    return [Size(model, min(last, round(first * 2 ** (step / 4))), shape.num_experts, shape.top_k) for step in steps]


def borders(bound: Bound, shape: MoEShape) -> Iterable[float]:
    """A line's bounds in tokens of a model."""
    per_expert = bound.tokens_per_expert * shape.num_experts / shape.top_k
    return [border for border in (bound.tokens, per_expert) if border != math.inf]
