# SPDX-License-Identifier: Apache-2.0
"""The conformance suite: what a backend must get right before it may be listed in `backends/registry.py`.

    python -m tests.conformance.suite tiled --cases 1000 --seed 7 [--device cuda]

A failing case is shrunk and written to a file, which `pytest --replay FILE` runs again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from tests.conformance.cases import Case, Tensors, from_json, simpler
from tests.conformance.judge import Expected, complaint
from vllm_mxfp4_sm120.backends import registry, triton
from vllm_mxfp4_sm120.backends.base import Backend
from vllm_mxfp4_sm120.backends.triton import Triton
from vllm_mxfp4_sm120.moe import MoEWeights

FAILURES = Path(__file__).parents[2] / ".conformance"
MOST_SHRINKING = 300  # tries
EMULATED = "emulated"  # the native kernels, on a CPU
# Root mean square of the errors of a row or column, in units of their size. Two roundings to BF16, of the activation
# and of the output, make 1.65e-3 each. The upcast rounds each matmul's output too, before SwiGLU, which magnifies.
TOLERANCE = {"tiled": 3.5e-3, "native": 3.5e-3, "triton": 3.5e-3, "upcast": 1e-2}


def _as_loaded(case: Case, weights: MoEWeights) -> MoEWeights:
    """A copy that lies in memory as loading leaves it, which is what `prepare` rearranges in place."""
    loaded = MoEWeights.empty(case.shape, weights.w13.device)
    for name, tensor in vars(weights).items():
        if tensor is not None:
            getattr(loaded, name).copy_(tensor)
    return loaded


# Triton's interpreter truncates to BF16 where GPUs round, and takes a second for a small layer.
INTERPRETED_TOLERANCE = 8e-3


def _as_it_is(case: Case) -> Case:
    return case


def _small(case: Case) -> Case:
    """The same with few experts, blocks and tokens: enough for two tiles of one expert, and for several chunks."""
    experts = min(case.experts, 8)
    return replace(
        case,
        experts=experts,
        top_k=min(case.top_k, experts),
        hidden_blocks=min(case.hidden_blocks, 9),
        intermediate_blocks=min(case.intermediate_blocks, 5),
        tokens=min(case.tokens, 70 if experts * case.hidden_blocks < 8 else 9),
    )


@dataclass(frozen=True)
class Subject:
    """What is tried: a backend on a device, to a tolerance. `suits` turns a case into one that it can be given."""

    name: str
    backend: type[Backend]
    tolerance: float
    device: str = "cpu"
    suits: Callable[[Case], Case] = _as_it_is

    @classmethod
    def named(cls, name: str, device: str = "cpu") -> Subject:
        """A backend of this package, by its name."""
        backend = registry.load(name)
        if backend is Triton and triton.INTERPRETED:
            return cls(name, backend, INTERPRETED_TOLERANCE, device, _small)
        return cls(name, backend, TOLERANCE.get(name, backend.tolerance), device)

    def complaint(self, case: Case) -> str | None:
        """One line that says what the backend did wrong; None if it was right, or declined the weights."""
        case = self.suits(case)
        try:
            drawn = case.tensors()
            given = drawn.to(self.device)
            if self.declines(given):
                return None
            layer = self.backend(case.shape)
            prepared = layer.prepare(_as_loaded(case, given.weights))
            answer = given.run(layer, prepared)
            # The same tokens in the opposite order, so that no answer can be an earlier call's. The first one must
            # still stand after that.
            again = given.flip().run(layer, prepared)
            expected = Expected.of(case, drawn)  # on the CPU: faster for many small experts, and not that card's
        except Exception as error:
            return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        first = complaint(answer.cpu(), expected, self.tolerance)
        second = first or complaint(again.cpu(), expected.flip(), self.tolerance)
        return first or (second and f"tokens in the opposite order: {second}")

    def declines(self, given: Tensors) -> bool:
        """Has the backend said no to these weights?"""
        return self.backend.why_not_weights(given.weights) is not None


def emulated() -> Subject:
    """The native kernels, built for their emulator."""
    from tests.conformance.emulated import emulated_native, small
    from tests.kernels.emulated import build

    return Subject(EMULATED, emulated_native(build()), TOLERANCE["native"], suits=small)


@dataclass(frozen=True)
class Failure:
    """A case that went wrong, shrunk."""

    subject: str
    case: Case
    complaint: str

    def report(self) -> str:
        """For people; the case is written to a file."""
        return f"{self.complaint}\n{self.case}\npytest --replay {self.write()}"

    def write(self, directory: Path = FAILURES) -> Path:
        """To a file for `pytest --replay`, and where it lies."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.subject.replace(' ', '-')}-{self.case.seed}.json"
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> Failure:
        given = json.loads(path.read_text())
        return cls(given["subject"], from_json(given["case"]), given["complaint"])


def first_failure(subject: Subject, cases: Iterable[Case]) -> Failure | None:
    """The first case that goes wrong, shrunk; None if all go right."""
    for case in cases:
        if (said := subject.complaint(case)) is not None:
            return shrink(subject, case, said)
    return None


def shrink(subject: Subject, case: Case, said: str) -> Failure:
    """Greedily: any plainer case that goes wrong too, until none does."""
    tries, plainer = 0, iter(simpler(case))
    while tries < MOST_SHRINKING and (candidate := next(plainer, None)) is not None:
        tries += 1
        if (now := subject.complaint(candidate)) is not None:
            case, said, plainer = candidate, now, iter(simpler(candidate))
    return Failure(subject.name, case, said)


def seeds(seed: int, count: int) -> Iterable[int]:
    """Of the cases of one run."""
    return (seed * 1_000_003 + index for index in range(count))


def draw(seed: int, count: int, shapes: int | None = None) -> Iterable[Case]:
    """`count` cases, of at most `shapes` layers: each new one is compiled for by the likes of Triton."""
    for index, case_seed in enumerate(seeds(seed, count)):
        yield Case.draw(case_seed, None if shapes is None else seed + index % shapes)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.suite")
    parser.add_argument("backend", choices=(*registry.NAMES, EMULATED))
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--shapes", type=int, help="draw no more than so many layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    subject = emulated() if args.backend == EMULATED else Subject.named(args.backend, args.device)
    failure = first_failure(subject, draw(args.seed, args.cases, args.shapes))
    if failure is None:
        print(f"{args.backend}: {args.cases} cases from seed {args.seed} are right")
        return 0
    print(failure.report(), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
