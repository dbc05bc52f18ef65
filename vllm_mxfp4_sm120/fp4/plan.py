# SPDX-License-Identifier: Apache-2.0
"""Which kernels of the native backend answer at how many tokens, on FP4 terms or on BF16.

FP4 kernels serve after they have solved the proof's problem in its process, and only from the number of tokens on from
which they were faster there than the BF16 kernels. `mxfp4-sm120 tune` measures that number more closely.

What `activation: bf16` promises, three terms don't keep: a layer's output is 1.2 to 3.9 times as wrong as the BF16
kernels' (docs/fp4.md). Four terms are 0.75 times as wrong, hence four.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_mxfp4_sm120 import proof, settings
from vllm_mxfp4_sm120.backends import tuning
from vllm_mxfp4_sm120.backends.native import fp4, library
from vllm_mxfp4_sm120.backends.tuning import Bound, Family, Found, Rule
from vllm_mxfp4_sm120.moe import MoEShape
from vllm_mxfp4_sm120.platform import Machine
from vllm_mxfp4_sm120.proof.problem import problem_shape

# The values of the setting `activation` that FP4 terms may answer, and how many.
BF16, OFF = "bf16", "off"
TERMS = {BF16: 4, "mxfp4x3": 3, "mxfp4x2": 2}
TRIAL = "vllm_mxfp4_sm120.fp4.trial:solve"  # imported in the proof's process only


@dataclass(frozen=True)
class Times:
    """At so many tokens: microseconds of a layer by kernel, `BF16` among them."""

    tokens: int
    by_kernel: Mapping[str, float]


@dataclass(frozen=True)
class Trial:
    """What the proof's process found. `errors` are the largest relative ones on its problem; `wrong`: why not."""

    errors: Mapping[str, float]
    wrong: Mapping[str, str]
    times: Sequence[Times]

    @classmethod
    def from_json(cls, found: Any) -> Trial:
        """Raises AttributeError, KeyError, TypeError or ValueError for what is none."""
        times = [Times(int(tokens), _numbers(by_kernel)) for tokens, by_kernel in found["times"]]
        return cls(_numbers(found["errors"]), {name: str(why) for name, why in found["wrong"].items()}, times)


@dataclass(frozen=True)
class Plan:
    """`lines`: (up to so many tokens, an FP4 kernel or `BF16`), ascending; `reason`: why no FP4 kernel answers."""

    reason: str | None = None
    terms: int = 0
    lines: tuple[tuple[float, str], ...] = ()
    trial: Trial | None = None

    @property
    def kernels(self) -> tuple[tuple[float, int | None], ...]:
        """What `Native.fp4_kernels` takes."""
        if not self.spans:
            return ()
        return tuple((most, number_of(kernel)) for most, kernel in self.lines)

    @property
    def spans(self) -> list[tuple[int, float]]:
        """The first and the last number of tokens of each range that FP4 kernels answer."""
        found: list[tuple[int, float]] = []
        first = 1
        for most, kernel in self.lines:
            if kernel != BF16 and found and found[-1][1] == first - 1:
                found[-1] = found[-1][0], most
            elif kernel != BF16:
                found.append((first, most))
            if most != math.inf:
                first = int(most) + 1
        return found

    def __str__(self) -> str:
        """What activations are, and where."""
        if self.reason is not None:
            return f"BF16 ({self.reason})"
        if not self.spans:
            return f"BF16 ({self.terms} FP4 terms weren't faster)"
        where = " and ".join(
            f"from {first} tokens on" if last == math.inf else f"at {first} to {last:g} tokens"
            for first, last in self.spans
        )
        return f"{self.terms} FP4 terms {where}, else BF16"


def make(machine: Machine, shape: MoEShape, activation: str, prove: bool = True) -> Plan:
    """Ask the card, or the record of an earlier answer. `activation` is the setting's value.

    The native backend can run on the machine. `prove` False: nothing is tried, so no FP4 kernel answers.
    """
    if activation == OFF:
        return Plan(f"{settings.ACTIVATION.key} is {OFF}")
    if (reason := fp4.why_not(machine.capability)) is not None:
        return Plan(reason)
    if not prove:
        return Plan(f"without a proof no FP4 kernel answers ({settings.PROOF.name})")
    problems = {"layer": asdict(shape), "problem": asdict(problem_shape(machine, shape))}
    answer = proof.ask("fp4", TRIAL, machine, problems)
    if answer.reason is not None:
        return Plan(answer.reason)
    try:
        return decide(Trial.from_json(answer.found), machine, shape, TERMS[activation])
    except (AttributeError, KeyError, TypeError, ValueError):
        return Plan("its record can't be read; `mxfp4-sm120 doctor --forget` tries again")


def decide(trial: Trial, machine: Machine, shape: MoEShape, terms: int) -> Plan:
    """From what was found. A card's own rule comes before it, where kernels are right."""
    names = kernels_of(terms)
    for name in names:
        if name in trial.wrong:
            return Plan(f"{name}: {trial.wrong[name]}", terms, trial=trial)
    own = own_rule(machine.name) if terms == TERMS[BF16] else None
    rule = own.rule if own is not None else rule_of(trial.times, names)
    return Plan(None, terms, tuple(lines(rule, shape)), trial)


def kernels_of(terms: int) -> list[str]:
    """Names of the FP4 kernels that have so many. The library must be loaded."""
    return [config.name for config in fp4.configurations() if config.terms == terms]


def number_of(kernel: str) -> int | None:
    """An FP4 kernel's place in the library's table, None for BF16 kernels. The library must be loaded."""
    return {config.name: number for number, config in enumerate(fp4.configurations())}.get(kernel)


def only(kernel: str) -> tuple[tuple[float, int | None], ...]:
    """For `Native.fp4_kernels`: one kernel by name, or `BF16`, whatever the number of tokens."""
    return ((math.inf, number_of(kernel)),)


def rule_of(times: Sequence[Times], names: Sequence[str]) -> Rule:
    """The fastest of these kernels from the smallest timed number of tokens on from which it was always faster.

    By `proof.MARGIN`, than the BF16 kernels, which have all smaller numbers; between two numbers as at the larger.
    """
    rule: list[Bound] = []
    first = math.inf
    for timed in sorted(times, key=lambda each: each.tokens, reverse=True):
        fastest = min(names, key=timed.by_kernel.__getitem__)
        if not timed.by_kernel[fastest] <= proof.MARGIN * timed.by_kernel[BF16]:
            break
        first = timed.tokens
        if not rule:
            rule = [Bound(fastest)]
        elif rule[0].kernel != fastest:
            rule.insert(0, Bound(fastest, tokens=first))
    return (Bound(BF16, tokens=first - 1), *rule) if rule else (Bound(BF16),)


def lines(rule: Rule, shape: MoEShape) -> Iterator[tuple[float, str]]:
    """A rule in numbers of tokens for one shape. A call of more than kernels take at once goes in parts of so many."""
    most = 0
    for bound in rule:
        tokens = min(bound.tokens, bound.tokens_per_expert * shape.num_experts / shape.top_k)
        if tokens >= library.limits().tokens:
            yield math.inf, bound.kernel
            return
        if tokens >= most + 1:
            yield (most := math.floor(tokens)), bound.kernel


def own_rule(card: str) -> Found | None:
    """What `mxfp4-sm120 tune` has found, for four terms; None where it hasn't. The library must be loaded."""
    found, ignored = tuning.find_own(card, Family.FP4, library.version(), check)
    if ignored is not None:
        tuning.warn(ignored)
    return found


def check(rule: Rule, name: str) -> None:
    """Raises ValueError for a kernel that isn't one of four terms, nor `BF16`; `name` is the rule's file."""
    kernels = [BF16, *kernels_of(TERMS[BF16])]
    for bound in rule:
        if bound.kernel not in kernels:
            raise ValueError(f"{name}: {bound.kernel} can't answer for BF16, expected one of {', '.join(kernels)}")


def _numbers(found: Any) -> dict[str, float]:
    return {name: float(number) for name, number in found.items()}
