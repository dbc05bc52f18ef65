# SPDX-License-Identifier: Apache-2.0
"""One run of `tune`: time what hasn't been timed, keep it, decide, write the card's file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_mxfp4_sm120.backends.tuning import Family, Rule
from vllm_mxfp4_sm120.cache import make_folder
from vllm_mxfp4_sm120.drafts import draft_of
from vllm_mxfp4_sm120.tune.decide import Decision, decide
from vllm_mxfp4_sm120.tune.sizes import Size

ROUNDS = 5  # in each of which every kernel has its turn
Show = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Timed:
    """Of one size: microseconds of each round by kernel, and why kernels that failed did."""

    rounds: dict[str, list[float]]
    failed: dict[str, str] = field(default_factory=dict)


Timer = Callable[[Family, Size, Sequence[str]], Timed]


@dataclass(frozen=True)
class Job:
    """One family of kernels: today's rule, the sizes to time, and which kernels can take each."""

    family: Family
    version: str
    rule: Rule
    sizes: tuple[Size, ...]
    kernels: Callable[[Size], Sequence[str]]


@dataclass(frozen=True)
class Tuned:
    """What became of a job; `failed` kernels are in no rule."""

    job: Job
    decision: Decision
    failed: dict[str, str]


class Notebook:
    """Keeps what was timed in a file, so that a run that was stopped goes on; None keeps nothing.

    `circumstances` are what times depend on: card, driver, versions. Notes of others are thrown away.
    """

    def __init__(self, path: Path | None, circumstances: Mapping[str, Any]) -> None:
        self.path, self.circumstances = path, dict(circumstances)
        self.notes: dict[str, Any] = {}
        # Where there are none, or damaged ones, it's as if nothing had been timed.
        with suppress(OSError, ValueError, TypeError, LookupError, RecursionError):
            kept = json.loads(path.read_text()) if path is not None else {}
            if kept["circumstances"] == self.circumstances:
                self.notes = dict(kept["notes"])

    def read(self, family: Family, size: Size, kernels: Sequence[str]) -> Timed | None:
        """What was timed of just these kernels."""
        timed = _sound(self.notes.get(_name(family, size)))
        return timed if timed is not None and {*timed.rounds, *timed.failed} == set(kernels) else None

    def write(self, family: Family, size: Size, timed: Timed) -> None:
        """Whole or not at all. Raises OSError."""
        self.notes[_name(family, size)] = vars(timed)
        if self.path is not None:
            make_folder(self.path.parent)
            with draft_of(self.path) as draft:
                draft.write_text(json.dumps({"circumstances": self.circumstances, "notes": self.notes}))

    def forget(self) -> None:
        """All of it."""
        self.notes = {}
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _sound(note: Any) -> Timed | None:
    """A note as `write` makes it; None for anything else."""
    try:
        times = [time for rounds in note["rounds"].values() for time in rounds]
        lengths = {len(rounds) for rounds in note["rounds"].values()}
        positive = all(type(time) in (int, float) and 0 < time < math.inf for time in times)
        worded = all(isinstance(why, str) for why in note["failed"].values())
    except (TypeError, LookupError, AttributeError):
        return None
    return Timed(note["rounds"], note["failed"]) if positive and worded and lengths in (set(), {ROUNDS}) else None


def run(jobs: Sequence[Job], timer: Timer, notebook: Notebook, show: Show) -> list[Tuned]:
    """Time and decide. Raises RuntimeError for a kernel of today's rule that doesn't compute what it should."""
    total, done = sum(len(job.sizes) for job in jobs), 0
    outcomes = []
    for job in jobs:
        times: dict[Size, dict[str, list[float]]] = {}
        failed: dict[str, str] = {}
        for size in job.sizes:
            show(f"{job.family} {size.model}, {size.tokens} tokens", done, total)
            kernels = [kernel for kernel in job.kernels(size) if kernel not in failed]
            timed = notebook.read(job.family, size, kernels)
            if timed is None:
                timed = timer(job.family, size, kernels)
                notebook.write(job.family, size, timed)
            times[size] = timed.rounds
            failed |= {kernel: f"{size.tokens} tokens of {size.model}: {why}" for kernel, why in timed.failed.items()}
            expect_sound(job, failed)
            done += 1
        for kernel in failed:  # what is wrong once is in no rule
            for rounds in times.values():
                rounds.pop(kernel, None)
        outcomes.append(Tuned(job, decide(job.rule, times), failed))
    show("done", total, total)
    return outcomes


def expect_sound(job: Job, failed: Mapping[str, str]) -> None:
    """Raises RuntimeError where a kernel of today's rule is among the failed."""
    for bound in job.rule:
        if bound.kernel in failed:
            raise RuntimeError(
                f"{bound.kernel} of today's rule fails, {failed[bound.kernel]}; "
                "nothing was written, MXFP4_SM120_BACKEND names a backend that serves without it"
            )


def contents_of(card: str, measured: str, outcomes: Sequence[Tuned], before: Mapping[str, Any]) -> dict[str, Any]:
    """A card's file: what was timed, and of the file `before` what says nothing of that."""
    contents: dict[str, Any] = {"for": card, "measured": measured}
    for outcome in outcomes:
        family = outcome.job.family
        contents[family] = outcome.job.version
        contents[family.key] = [bound.as_json() for bound in outcome.decision.rule]
    return contents | {key: value for key, value in before.items() if key not in contents}


def write(path: Path, contents: Mapping[str, Any]) -> None:
    """The card's file, whole or not at all. Raises OSError."""
    make_folder(path.parent)
    with draft_of(path) as draft:
        draft.write_text(_pretty(contents))


def _pretty(contents: Mapping[str, Any]) -> str:
    """JSON with a line for each line of a rule."""
    lines = []
    for name, value in contents.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(f"    {json.dumps(each)}" for each in value) + "\n  ]"
        lines.append(f"  {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _name(family: Family, size: Size) -> str:
    return f"{family} {size.model} {size.tokens}"
