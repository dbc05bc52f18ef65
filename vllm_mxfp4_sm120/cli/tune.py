# SPDX-License-Identifier: Apache-2.0
"""`mxfp4-sm120 tune`: time this card's kernels around the borders of its rule, and move those that gain by it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vllm_mxfp4_sm120 import platform, proof, selector
from vllm_mxfp4_sm120.backends import tuning
from vllm_mxfp4_sm120.backends.native import Native, library
from vllm_mxfp4_sm120.backends.tuning import Family, Rule
from vllm_mxfp4_sm120.bench.models import Model, model
from vllm_mxfp4_sm120.cache import cache_dir, make_folder
from vllm_mxfp4_sm120.cli.ending import Outcome, in_words
from vllm_mxfp4_sm120.cli.progress import progress
from vllm_mxfp4_sm120.drafts import alone, expect_writable
from vllm_mxfp4_sm120.tune import gpu, session
from vllm_mxfp4_sm120.tune.decide import GAIN
from vllm_mxfp4_sm120.tune.session import Job, Notebook, Timer, Tuned

MODELS = ("20b", "120b")
EXAMPLES = f"""examples:
  mxfp4-sm120 tune
  mxfp4-sm120 tune --model 20b --dry-run

Every kernel is timed on both sides of each border of the rule that this card has now, in CUDA graphs over several
layers' weights, in rounds in which all take turns; each answer is compared with float64 first. A call goes to another
kernel only where that was at least {GAIN - 1:.0%} faster, and faster in every round. What is written holds from the
next start on, for this version of the kernels. A run that was stopped goes on where it was.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("--model", choices=MODELS, help="whose layer to time alone (default: both, for one rule)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and don't write it")
    parser.add_argument("--again", action="store_true", help="forget what an earlier run has timed")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> Outcome:
    """Raises RuntimeError where there is nothing to tune, OSError, ValueError; KeyboardInterrupt says what is kept."""
    card, jobs, timer = bench(args)
    path = target(card) if not args.dry_run else tuning.user_path(card)
    with notebook(card, jobs) as notes, progress("tuning", quiet=args.json, unit="sizes") as show:
        if args.again:
            notes.forget()
        outcomes = session.run(jobs, timer, notes, show)
        before, said = of_before(path, card, outcomes)
        if not args.dry_run and path is not None:
            session.write(path, session.contents_of(card, measured(args), outcomes, before))
            notes.forget()
    last = f"wrote {path}: the next start takes it"
    if args.dry_run:
        last = f"would write {path or 'nothing: this user has no home directory'}"
    data = report(card, None if args.dry_run else path, outcomes) | {"before": said}
    return Outcome([*lines(outcomes), *said, last], data)


def of_before(path: Path | None, card: str, outcomes: Sequence[Tuned]) -> tuple[dict[str, Any], list[str]]:
    """What the file said, and in words what of it stays, or why nothing does."""
    try:
        before = tuning.written(path, card)
    except (OSError, ValueError) as error:
        return {}, [f"nothing of {path} stays: {in_words(error)}"]
    timed = {outcome.job.family for outcome in outcomes}
    kept = [family for family in Family if family.key in before and family not in timed]
    return before, [f"{family} {before.get(family)}: not timed now, its rule of before stays" for family in kept]


def bench(args: argparse.Namespace) -> tuple[str, list[Job], Timer]:
    """This card's name, what there is to tune, and who takes the time. Raises RuntimeError for a machine without."""
    machine = selector.this_machine()
    models: list[Model] = [model(name) for name in ([args.model] if args.model else MODELS)]
    if machine.capability is None:
        raise RuntimeError("there is no NVIDIA GPU here, and nothing else to tune: run it on the machine that serves")
    reason = machine.why_unsupported() or Native.why_not(machine, models[0].experts)
    if reason is None and library.load() == "stub":
        reason = f"the CUDA library is a stub: {library.REMEDY}"
    if reason is not None:
        raise RuntimeError(f"nothing can be tuned: {reason}")
    torch.cuda.set_device(device := proof.device(machine))
    jobs = [*gpu.jobs(machine.name, models), *gpu.fp4_jobs(machine, models)]
    return machine.name, jobs, gpu.OnGpu(device)


def target(card: str) -> Path:
    """The file to write, once its folder is there. Raises RuntimeError, OSError: before anything is timed."""
    path = tuning.user_path(card)
    if path is None:
        raise RuntimeError("this user has no home directory to keep a rule in: set XDG_CONFIG_HOME, or give --dry-run")
    try:
        make_folder(path.parent)
        expect_writable(path.parent)
    except OSError as error:
        why = error.strerror or error
        raise OSError(f"{path.parent} can't be written ({why}): set XDG_CONFIG_HOME, or give --dry-run") from error
    return path


@contextmanager
def notebook(card: str, jobs: Sequence[Job]) -> Iterator[Notebook]:
    """Where times are kept until the rule is written, for one run at a time: two would falsify each other's.

    Raises BlockingIOError while another run has it; KeyboardInterrupt says what is kept. Where nothing can be kept, it
    says so and goes on.
    """
    facts, folder = circumstances(card, jobs), cache_dir()
    why_not = "this user has no home directory"
    try:
        if folder is not None:
            make_folder(folder / "tuning")
            kept = folder / "tuning" / tuning.file_name(card)
            lock = kept.with_suffix(".lock")
            lock.touch()
    except OSError as error:
        folder, why_not = None, in_words(error)
    if folder is None:
        print(f"nothing is kept of a run that is stopped: {why_not}", file=sys.stderr)
        yield Notebook(None, facts)
        return
    with alone(lock):
        try:
            yield Notebook(kept, facts)
        except KeyboardInterrupt:
            where = f"what was timed is kept in {kept}, the same command goes on from there"
            raise KeyboardInterrupt(f"stopped; {where}") from None


def circumstances(card: str, jobs: Sequence[Job]) -> dict[str, Any]:
    """What times depend on."""
    versions = {job.family.value: job.version for job in jobs}
    return {"card": card, "driver": platform.driver(), "torch": torch.__version__, **versions}


def measured(args: argparse.Namespace) -> str:
    """How, for the file."""
    models = [args.model] if args.model else list(MODELS)
    return f"mxfp4-sm120 tune, layers of gpt-oss-{' and gpt-oss-'.join(models)}, torch {torch.__version__}"


def lines(outcomes: Sequence[Tuned]) -> Iterator[str]:
    """The report for people."""
    for outcome in outcomes:
        job, decision = outcome.job, outcome.decision
        yield f"{job.family} {job.version}: {len(job.sizes)} sizes timed, {len(decision.changes)} get another kernel"
        for change in decision.changes:
            size = f"{change.size.model}, {change.size.tokens} tokens"
            yield f"  {size:24}{change.before} -> {change.after}, {change.gain:.3f} times as fast"
        for kernel, why in outcome.failed.items():
            yield f"  left out: {kernel}, {why}"
        if decision.changes:
            yield from (f"  {text}" for text in rule_lines(decision.rule))
        else:
            yield f"  no other kernel is {GAIN - 1:.0%} faster anywhere: the rule stays as it is"


def rule_lines(rule: Rule) -> Iterator[str]:
    """A rule in words."""
    for bound in rule:
        limits = [f"{value:g} {name.replace('_', ' ')}" for name, value in bound.as_json().items() if name != "kernel"]
        yield f"{bound.kernel} for up to {' and '.join(limits)}" if limits else f"{bound.kernel} for all others"


def report(card: str, path: Path | None, outcomes: Sequence[Tuned]) -> dict[str, Any]:
    """What `--json` prints; `path` is what was written."""
    return {
        "card": card,
        "path": path and str(path),
        "families": {
            outcome.job.family: {
                "version": outcome.job.version,
                "before": [bound.as_json() for bound in outcome.job.rule],
                "after": [bound.as_json() for bound in outcome.decision.rule],
                "sizes": len(outcome.job.sizes),
                "changes": [
                    vars(change) | {"size": {"model": change.size.model, "tokens": change.size.tokens}}
                    for change in outcome.decision.changes
                ],
                "failed": outcome.failed,
            }
            for outcome in outcomes
        },
    }
