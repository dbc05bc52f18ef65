# SPDX-License-Identifier: Apache-2.0
"""`mxfp4-sm120 doctor`: what is here, which backends can serve with it, and what would be chosen."""

from __future__ import annotations

import argparse
import getpass
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from vllm_mxfp4_sm120 import __version__, memory, platform, proof, selector, settings
from vllm_mxfp4_sm120.backends import registry, triton
from vllm_mxfp4_sm120.backends.native import fp4, library
from vllm_mxfp4_sm120.backends.native import tuning as native_tuning
from vllm_mxfp4_sm120.checkpoint import Sizes, published_config
from vllm_mxfp4_sm120.cli import activations, surroundings
from vllm_mxfp4_sm120.cli.activations import Activations
from vllm_mxfp4_sm120.cli.ending import Outcome
from vllm_mxfp4_sm120.cli.progress import Show, progress
from vllm_mxfp4_sm120.cli.surroundings import Attention, Python
from vllm_mxfp4_sm120.dense import plan
from vllm_mxfp4_sm120.fit import Memory
from vllm_mxfp4_sm120.platform import Machine

MODELS = ("gpt-oss-20b", "gpt-oss-120b")
BATCH_INVARIANT = "VLLM_BATCH_INVARIANT"  # vLLM's variable, by which fewer kernels may answer
EXAMPLES = """examples:
  mxfp4-sm120 doctor
  mxfp4-sm120 doctor --report     # to paste into an issue
  mxfp4-sm120 doctor --json --no-proof

The exit status is 1 where nothing can serve. What a proof found is remembered; the next start asks no more.
"""
DISTRIBUTIONS = {"vLLM": "vllm", "FlashInfer": "flashinfer-python", "Triton": "triton"}


@dataclass(frozen=True)
class Gpu:
    """One card that this process sees. `memory` and what is `free` of it in bytes."""

    index: int
    name: str
    sm: str
    memory: int
    free: int


@dataclass(frozen=True)
class BackendReport:
    """`why_not` is None if it can run on this machine; `proof` is "right", what was wrong, or None if not tried.

    `automatic` is False for what is only used when it's asked for by name.
    """

    name: str
    automatic: bool
    why_not: str | None
    proof: str | None


@dataclass
class Report:
    """Everything that `doctor` prints."""

    versions: dict[str, str | None]
    machine: str
    gpus: list[Gpu] = field(default_factory=list)
    library: str | None = None  # what it is built for
    fp4: str | None = None  # what its FP4 kernels are built for
    library_version: str | None = None
    tuning: dict[str, str] = field(default_factory=dict)  # the file of each card's rule, by whose kernels and card
    backends: list[BackendReport] = field(default_factory=list)
    chosen: dict[str, str | None] = field(default_factory=dict)
    activations: dict[str, Activations] = field(default_factory=dict)  # by model, where there is a choice
    linears: dict[str, str] = field(default_factory=dict)  # which linear answers, by layer
    weights: dict[str, int] = field(default_factory=dict)  # bytes of a model's, packed
    free: int = 0  # bytes of the machine's memory
    pythons: list[Python] = field(default_factory=list)
    attention: Attention | None = None
    notes: list[str] = field(default_factory=list)
    flags: dict[str, str] = field(default_factory=dict)

    @property
    def can_serve(self) -> bool:
        """Is there a backend for each model?"""
        return None not in self.chosen.values()


def examine(prove: bool = True, show: Show = lambda *_: None) -> Report:
    """Look at everything; import nothing that isn't installed. Raises ValueError for a bad MXFP4_SM120_* variable.

    Each proof may take a minute: `show` is called with what is being asked.
    """
    settings.check()
    machine = selector.this_machine()
    report = Report(versions(), f"{machine.name} ({machine.sm})")
    if machine.capability is not None:
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            free = torch.cuda.mem_get_info(index)[0]
            report.gpus.append(Gpu(index, card.name, f"sm_{card.major}{card.minor}", card.total_memory, free))
    elif platform.driver() is not None:
        report.notes.append("there is an NVIDIA driver, but torch sees no GPU: a CPU build, or CUDA_VISIBLE_DEVICES?")
    look_at_library(report, machine)
    look_at_tuning(report)
    request = selector.Request.from_user(batch_invariant=os.environ.get(BATCH_INVARIANT, "") not in ("", "0"))
    request = replace(request, proof=prove and request.proof)
    asked = ["vLLM", *registry.NAMES, *MODELS, "linear layers"]

    def ask(what: str) -> None:
        show(what, asked.index(what), len(asked))

    ask("vLLM")
    look_around(report, ask_vllm=prove)
    layers = {model: Sizes.from_config(published_config(model)).layer for model in MODELS}
    report.weights = {model: Memory(published_config(model)).weights() for model in MODELS}
    report.free = memory.free_bytes() if machine.capability is None else 0
    shape = layers[MODELS[0]]
    for name in registry.NAMES:
        ask(name)
        backend = registry.load(name)
        why_not = machine.why_unsupported() or backend.why_not(machine, shape)
        tried = None
        if why_not is None and request.proof:
            tried = proof.why_not(backend, machine, shape) or "right"
        report.backends.append(BackendReport(name, name in selector.order(machine), why_not, tried))
    for model, shape in layers.items():
        ask(model)
        try:
            choice = selector.select(machine, shape, request)
            report.chosen[model] = choice.backend.name
            if choice.tells_activations:
                report.activations[model] = Activations.of(choice)
        except ValueError as error:
            report.chosen[model] = None
            report.notes.append(f"{model}: {error}")
    ask("linear layers")
    report.linears = linears(machine, request)
    show("done", len(asked), len(asked))
    flags = [*(setting.name for setting in settings.TABLE), BATCH_INVARIANT]
    report.flags = {flag: os.environ[flag] for flag in flags if os.environ.get(flag)}
    return report


def look_at_library(report: Report, machine: Machine) -> None:
    """What the CUDA library is built for and from, or why it can't be loaded."""
    try:
        if library.find(machine.capability) is not None:
            report.library = library.load()
            report.fp4, report.library_version = fp4.architectures() or None, library.version()
    except (OSError, RuntimeError) as error:
        report.notes.append(f"{library.LIBRARY.name}: {error}")


def look_at_tuning(report: Report) -> None:
    """Which rule says which kernel computes how many tokens, and why a user's own isn't used."""
    cards = dict.fromkeys(gpu.name for gpu in report.gpus)
    finders = {"native": native_tuning.found} if report.library not in (None, "stub") else {}
    if report.versions["Triton"] is not None:
        finders["triton"] = triton.found
    for card in cards:
        for name, find in finders.items():
            found = find(card)
            report.tuning[f"{name} on {card}"] = str(found.path)
            if found.ignored is not None:
                report.notes.append(found.ignored)


def linears(machine: Machine, request: selector.Request) -> dict[str, str]:
    """By layer, the same in all MODELS: which linear answers at which sizes, and why."""
    kind, one_for_all = settings.DENSE.get(), selector.ONE_FOR_ALL if request.batch_invariant else None
    if kind == "off":
        return {"linear layers": "vLLM's own (dense is off)"}
    if kind == "bf16" and (reason := one_for_all or plan.why_not(machine)) is not None:
        return {"linear layers": f"vLLM's own ({reason})"}
    layers = plan.shapes(published_config(MODELS[0]), 1, kind == "int8")
    made = plan.make(layers, machine, request.proof) if one_for_all is None else plan.Plan(one_for_all)
    return {f"{name} {shape}": made.text(shape) for name, shape in layers.items()}


def look_around(report: Report, ask_vllm: bool) -> None:
    """Who will find this plugin, and what the vLLM that is here does with the rest of the model."""
    report.pythons = surroundings.other_pythons()
    why_not_found = surroundings.why_not_found()
    if report.versions["vLLM"] is not None:
        if why_not_found is not None:
            report.notes.append(why_not_found)
        if ask_vllm:
            report.attention = surroundings.attention()
    else:
        report.notes.append("vLLM is not installed for this Python")
    for other in report.pythons:
        if other.vllm is not None and other.plugin is None:
            report.notes.append(f"{other.executable} has vLLM {other.vllm} without this plugin: install it there, too")


def versions() -> dict[str, str | None]:
    """Of all that takes part; None for what isn't there."""
    found: dict[str, str | None] = {
        "mxfp4-sm120": __version__,
        "driver": platform.driver(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
    }
    return found | {title: proof.version(name) for title, name in DISTRIBUTIONS.items()}


def lines(report: Report) -> Iterator[str]:
    """The report for people."""
    yield "  ".join(f"{name} {version or 'none'}" for name, version in report.versions.items())
    for gpu in report.gpus:
        yield f"GPU {gpu.index}  {gpu.name}  {gpu.sm}  {gpu.memory / 2**30:.0f} GiB, {gpu.free / 2**30:.1f} free"
    if not report.gpus:
        yield "no NVIDIA GPU"
    if report.library is not None:
        yield f"CUDA library  built for {report.library}, version {report.library_version}"
        yield f"              FP4 kernels for {report.fp4 or 'no card'}"
    else:
        yield "CUDA library  none"
    yield from (f"tuning        {name}: {path}" for name, path in report.tuning.items())
    for python in report.pythons:
        yield f"{python.executable}  vLLM {python.vllm or 'none'}, plugin {python.plugin or 'none'}"
    if report.attention is not None:
        yield f"attention     {report.attention.name or report.attention.why_unknown}"
        yield from (f"              not {name}: {why}" for name, why in report.attention.refused.items())
    yield ""
    for backend in report.backends:
        if backend.why_not is not None:
            state = f"no: {backend.why_not}"
        else:
            state = {None: "ready, not proven", "right": "ready, proven"}.get(backend.proof, f"no: {backend.proof}")
        asked = "" if backend.automatic or backend.why_not is not None else " (only if asked for)"
        yield f"{backend.name:24}{state}{asked}"
    yield ""
    for model, name in report.chosen.items():
        yield f"{model:24}{name or 'none: see below'}"
        yield f"{'':24}{memory_beside(report, model)}"
        if model in report.activations:
            yield f"{'':24}activations of the experts: {report.activations[model].answers}"
    for layer, answers in report.linears.items():
        yield f"{layer:23} {answers}"
    for flag, value in report.flags.items():
        yield f"{flag}={value}"
    yield from report.notes
    for model, found in report.activations.items():
        if found.trial is not None:
            yield from ("", *activations.table(model, found.trial))


def memory_beside(report: Report, model: str) -> str:
    """What a model's weights take, beside what is free."""
    weights = report.weights[model] / 2**30
    free = max((gpu.free for gpu in report.gpus), default=report.free) / 2**30
    where = "on the emptiest GPU" if report.gpus else "of the machine's memory"
    fits = "the KV cache comes on top" if weights < free else "too little for one rank"
    return f"weights {weights:.1f} GiB, {free:.1f} GiB are free {where}: {fits}"


def markdown(report: Report) -> str:
    """The report for an issue, without what says who or where its user is."""
    return f"### mxfp4-sm120 doctor\n\n```\n{scrub(chr(10).join(lines(report)))}\n```"


def scrub(text: str) -> str:
    """Paths but for their last part, keys, the names of user and machine: all left out."""
    text = re.sub(r"\b(?:hf_|sk-|ghp_|github_pat_)[\w-]{6,}", "<key>", text)
    text = re.sub(rf"{re.escape(settings.CACHE_DIR.name)}=.*", f"{settings.CACHE_DIR.name}=<path>", text)
    for name, instead in ((_home(), "~"), (_user(), "<user>"), (socket.gethostname(), "<host>")):
        if name and name not in ("/", "root", "localhost"):
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", instead, text)
    return re.sub(r"(?<![\w<])~?/(?:[^\s/:;,'\"]+/)+", "<path>/", text)


def _home() -> str | None:
    try:
        return str(Path.home())
    except RuntimeError:
        return None


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # an id without a name
        return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--report", action="store_true", help="print it as Markdown for a bug report, without names")
    parser.add_argument(
        "--no-proof", action="store_true", help="don't try the backends nor vLLM, only say what could run"
    )
    parser.add_argument("--forget", action="store_true", help="forget what earlier proofs found, and try again")


def run(args: argparse.Namespace) -> Outcome:
    """Its status is 0 if something can serve, 1 if not."""
    if args.forget:
        proof.forget()
    with progress("asking", quiet=args.json, unit="questions") as show:
        report = examine(prove=not args.no_proof, show=show)
    said = [markdown(report)] if args.report else lines(report)
    return Outcome(said, asdict(report) | {"can_serve": report.can_serve}, 0 if report.can_serve else 1)
