# SPDX-License-Identifier: Apache-2.0
"""From times to a rule: pure, and careful. No call is given to another kernel unless that was faster beyond doubt.

A rule is changed an edit at a time: a bound is moved, a line is removed, gets another kernel, or is split. An edit is
allowed if each timed size that it gives to another kernel gains at least GAIN, and is faster in every round. Of those
the one that gains most is made, until there is none. A kernel that has no time at a size can't take it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from vllm_mxfp4_sm120.backends.tuning import Bound, Rule
from vllm_mxfp4_sm120.tune.sizes import Size

# Less than 2 % isn't worth a change of kernels.
GAIN = 1.02
FIELDS = ("tokens", "tokens_per_expert")
Times = Mapping[Size, Mapping[str, Sequence[float]]]  # microseconds of each round, in which the kernels took turns


@dataclass(frozen=True)
class Change:
    """A timed size that another kernel computes now, so many times as fast."""

    size: Size
    before: str
    after: str
    gain: float


@dataclass(frozen=True)
class Decision:
    """The new rule, and what it changes."""

    rule: Rule
    changes: tuple[Change, ...] = ()


def decide(rule: Rule, times: Times) -> Decision:
    """The rule for a card on which these times were taken. Raises ValueError where a size has no kernel."""
    original = {size: serving(rule, size, times[size]) for size in times}
    while True:
        before = {size: serving(rule, size, times[size]) for size in times}
        scored = [(score, edited) for edited in _edits(rule, times, before) if (score := _score(edited, times, before))]
        if not scored:
            break
        rule = max(scored, key=lambda each: each[0])[1]
    after = {size: serving(rule, size, times[size]) for size in times}
    changes = (
        Change(size, original[size], after[size], gain(times[size], after[size], original[size]))
        for size in sorted(times)
        if after[size] != original[size]
    )
    return Decision(tidied(rule), tuple(changes))


def serving(rule: Rule, size: Size, able: Mapping[str, object]) -> str:
    """The kernel that a rule takes: of the first line that holds and whose kernel can. Raises ValueError for none."""
    for bound in rule:
        if bound.holds(size.tokens, size.tokens_per_expert) and bound.kernel in able:
            return bound.kernel
    raise ValueError(
        f"the rule has no kernel for {size.tokens} tokens of {size.model}, expected one of {', '.join(able)}"
    )


def gain(times: Mapping[str, Sequence[float]], after: str, before: str) -> float:
    """How many times as fast `after` is, the median of the rounds; 1 unless it is faster in each of them."""
    ratios = [old / new for old, new in zip(times[before], times[after], strict=True)]
    return statistics.median(ratios) if min(ratios) > 1 else 1.0


def _score(rule: Rule, times: Times, before: Mapping[Size, str]) -> float:
    """What an edit gains, as the logarithm of all gains together; 0 if it isn't allowed."""
    score = 0.0
    for size, old in before.items():
        if (new := serving(rule, size, times[size])) != old:
            if (gained := gain(times[size], new, old)) < GAIN:
                return 0.0
            score += math.log(gained)
    return score


def _edits(rule: Rule, times: Times, before: Mapping[Size, str]) -> Iterator[Rule]:
    """Every edit that could help. Bounds go where a size that could be faster begins or ends."""
    winners = {
        size: [kernel for kernel in times[size] if gain(times[size], kernel, old) >= GAIN]
        for size, old in before.items()
    }
    slow = sorted(size for size, faster in winners.items() if faster)
    for index, bound in enumerate(rule):
        if index < len(rule) - 1:
            yield rule[:index] + rule[index + 1 :]
            for field in FIELDS:
                if getattr(bound, field) != math.inf:
                    for value in sorted({place for size in slow for place in _places(size, field)}):
                        yield _with(rule, index, _bounded(bound, field, value))
        here = [size for size in before if _line(rule, size, times[size]) == index]
        for kernel in sorted({kernel for size in here for kernel in winners[size]}):
            yield _with(rule, index, replace(bound, kernel=kernel))
            for field in reversed(FIELDS):  # of two that gain the same, the one that holds for every model
                yield from _splits(rule, index, kernel, field, here, winners)


def _splits(
    rule: Rule, index: int, kernel: str, field: str, here: Sequence[Size], winners: Mapping[Size, Sequence[str]]
) -> Iterator[Rule]:
    """Give the part of a line in which a kernel wins to that kernel: each run of sizes along an axis, two at least."""
    bound = rule[index]
    run: list[Size] = []
    for size in [*sorted(here, key=lambda each: each.along(field)), None]:
        if size is not None and kernel in winners[size]:
            run.append(size)
        elif len(run) < 2:
            run = []
        else:
            below, last = run[0].smaller().along(field), run[-1].along(field)
            inserted = [_bounded(bound, field, below)] if below > 0 else []
            inserted.append(_bounded(replace(bound, kernel=kernel), field, last))
            yield rule[:index] + tuple(inserted) + rule[index:]
            run = []


def _line(rule: Rule, size: Size, able: Mapping[str, object]) -> int:
    return next(
        i for i, bound in enumerate(rule) if bound.holds(size.tokens, size.tokens_per_expert) and bound.kernel in able
    )


def _places(size: Size, field: str) -> Iterator[float]:
    """Where a bound takes a size in, and where it just leaves it out."""
    yield size.along(field)
    if size.tokens > 1:
        yield size.smaller().along(field)


def _bounded(bound: Bound, field: str, value: float) -> Bound:
    return replace(bound, tokens=value) if field == "tokens" else replace(bound, tokens_per_expert=value)


def _with(rule: Rule, index: int, bound: Bound) -> Rule:
    return (*rule[:index], bound, *rule[index + 1 :])


def tidied(rule: Rule) -> Rule:
    """Without lines that no call reaches, and without those that say what the next one says, too."""
    reached = [bound for i, bound in enumerate(rule) if not any(_within(bound, earlier) for earlier in rule[:i])]
    following: list[Bound | None] = [*reached[1:], None]
    return tuple(
        bound
        for bound, after in zip(reached, following, strict=True)
        if after is None or bound.kernel != after.kernel or not _within(bound, after)
    )


def _within(bound: Bound, other: Bound) -> bool:
    """Does the other line hold wherever this one does?"""
    return all(getattr(bound, field) <= getattr(other, field) for field in FIELDS)
