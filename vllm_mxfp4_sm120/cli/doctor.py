"""`mxfp4-sm120 doctor`: what is here, which backends can serve with it, and what would be chosen."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

import torch

from vllm_mxfp4_sm120 import __version__, envs, platform, proof, selector
from vllm_mxfp4_sm120.backends import native
from vllm_mxfp4_sm120.checkpoint import Sizes, published_config
from vllm_mxfp4_sm120.platform import Machine

MODELS = ("gpt-oss-20b", "gpt-oss-120b")
DISTRIBUTIONS = {"vLLM": "vllm", "FlashInfer": "flashinfer-python", "Triton": "triton"}


@dataclass(frozen=True)
class Gpu:
    """One card that this process sees. `memory` in bytes."""

    index: int
    name: str
    sm: str
    memory: int


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
    library: str | None = None
    backends: list[BackendReport] = field(default_factory=list)
    chosen: dict[str, str | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    flags: dict[str, str] = field(default_factory=dict)

    @property
    def can_serve(self) -> bool:
        """Is there a backend for each model?"""
        return None not in self.chosen.values()


def examine(prove: bool = True) -> Report:
    """Look at everything; import nothing that isn't installed. Raises ValueError for a bad MXFP4_SM120_* variable."""
    envs.check()
    machine = Machine.here()
    report = Report(versions(), f"{machine.name} ({machine.sm})")
    if machine.capability is not None:
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            report.gpus.append(Gpu(index, card.name, f"sm_{card.major}{card.minor}", card.total_memory))
    elif platform.driver() is not None:
        report.notes.append("there is an NVIDIA driver, but torch sees no GPU: a CPU build, or CUDA_VISIBLE_DEVICES?")
    if native.LIBRARY.exists():
        try:
            report.library = native.load()
        except (OSError, RuntimeError) as error:
            report.notes.append(f"{native.LIBRARY.name}: {error}")
    request = selector.Request.from_user()
    request = replace(request, proof=prove and request.proof)
    layers = {model: Sizes.from_config(published_config(model)).layer for model in MODELS}
    shape = layers[MODELS[0]]
    for name in selector.MODULES:
        backend = selector.load(name)
        why_not = machine.why_unsupported() or backend.why_not(machine, shape)
        tried = None
        if why_not is None and request.proof:
            tried = proof.why_not(backend, machine, shape) or "right"
        report.backends.append(BackendReport(name, name in selector.order(machine), why_not, tried))
    for model, shape in layers.items():
        try:
            report.chosen[model] = selector.select(machine, shape, request).backend.name
        except ValueError as error:
            report.chosen[model] = None
            report.notes.append(f"{model}: {error}")
    report.flags = {
        variable.name: os.environ[variable.name] for variable in envs.TABLE if os.environ.get(variable.name)
    }
    return report


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
        yield f"GPU {gpu.index}  {gpu.name}  {gpu.sm}  {gpu.memory / 2**30:.0f} GiB"
    if not report.gpus:
        yield "no NVIDIA GPU"
    yield f"CUDA library  {'built for ' + report.library if report.library else 'none'}"
    yield ""
    for backend in report.backends:
        if backend.why_not is not None:
            state = f"no: {backend.why_not}"
        else:
            state = {None: "ready, not proven", "right": "ready, proven"}.get(backend.proof, f"no: {backend.proof}")
        yield f"{backend.name:24}{state}{'' if backend.automatic else ' (only if asked for)'}"
    yield ""
    for model, name in report.chosen.items():
        yield f"{model:24}{name or 'none: see below'}"
    for flag, value in report.flags.items():
        yield f"{flag}={value}"
    yield from report.notes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--no-proof", action="store_true", help="don't try the backends, only say whether they could run"
    )
    parser.add_argument("--forget", action="store_true", help="forget what earlier proofs found, and try again")


def run(args: argparse.Namespace) -> int:
    """Print the report. Returns 0 if something can serve, 1 if not."""
    if args.forget:
        proof.forget()
    report = examine(prove=not args.no_proof)
    if args.json:
        print(json.dumps(asdict(report) | {"can_serve": report.can_serve}, indent=2))
    else:
        print("\n".join(lines(report)))
    return 0 if report.can_serve else 1
