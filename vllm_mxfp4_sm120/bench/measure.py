# SPDX-License-Identifier: Apache-2.0
"""The measurement: every candidate checked against float64 at every size, then timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vllm_mxfp4_sm120.bench import dense, experts
from vllm_mxfp4_sm120.bench.limits import Rates
from vllm_mxfp4_sm120.bench.models import Inputs, Judge, Model, dense_copies, random_weights, sample_of
from vllm_mxfp4_sm120.bench.table import LIMIT, Table
from vllm_mxfp4_sm120.platform import Machine
from vllm_mxfp4_sm120.proof import timing

Show = Callable[[str, int, int], None]
FEW_TOKENS = 64  # up to so many calls are short (timing.GRAPH_CALLS)
REPEATS = {"cuda": 20, "cpu": 5}


class Wrong(RuntimeError):
    """Answers that aren't those of the reference."""


@dataclass(frozen=True)
class Bench:
    """What all tables of a run share. `rates` are the machine's; `show` is told of each step."""

    machine: Machine
    device: torch.device
    rates: Rates
    where: str
    command: str
    show: Show = lambda *_: None


@dataclass(frozen=True)
class Candidate:
    """One column: a call for each layer that is walked over, given the inputs of a size."""

    name: str
    calls: Callable[[Inputs], Sequence[Callable[[], Tensor]]]
    tolerance: float | None
    capture: bool


def time_row(
    candidates: Iterable[Candidate], inputs: Inputs, judge: Judge, device: torch.device, table: Table
) -> dict[str, float]:
    """Microseconds of one layer for each candidate that computes this size right; the table learns why not others."""
    walks = walks_of(len(inputs.logits), len(inputs.x), device)
    ready: dict[str, timing.Walk] = {}
    for candidate in candidates:
        try:
            walk = timing.walk_over(candidate.calls(inputs), walks, candidate.capture)
            error = checked(walk, judge, candidate.tolerance)
        except Exception as failure:  # whatever other people's code raises is one line of the table
            table.left_out.setdefault(candidate.name, f"{len(inputs.x)} tokens: {one_line(failure)}")
            expect_cuda_alive(candidate.name, failure, device)
            continue
        ready[candidate.name] = walk
        if candidate.tolerance is not None:
            table.errors[candidate.name] = max(error, table.errors.get(candidate.name, 0.0))
    times = timing.medians({name: walk.run for name, walk in ready.items()}, device, REPEATS[device.type])
    return {name: time / ready[name].calls for name, time in times.items()}


def fastest(
    ways: Sequence[Sequence[Callable[[], Tensor]]], device: torch.device, capture: bool
) -> Sequence[Callable[[], Tensor]]:
    """Of several ways to make the same calls, by a few replays: which kernel of a table is served is chosen so, too."""
    if len(ways) == 1:
        return ways[0]
    walks = {str(number): timing.walk_over(calls, capture=capture) for number, calls in enumerate(ways)}
    times = timing.medians({number: walk.run for number, walk in walks.items()}, device, 3)
    return ways[int(min(times, key=times.__getitem__))]


def walks_of(layers: int, tokens: int, device: torch.device) -> int:
    """How often a graph walks over so many layers."""
    return max(1, timing.GRAPH_CALLS // layers) if device.type == "cuda" and tokens <= FEW_TOKENS else 1


def checked(walk: timing.Walk, judge: Judge, tolerance: float | None) -> float:
    """The relative error of the first layer's answer; without a tolerance it's just run. Raises Wrong."""
    answer = walk.answers()[0]
    if tolerance is None:
        return 0.0
    error = judge.relative_error(answer)
    if not error <= tolerance:  # NaN, too
        raise Wrong(f"wrong numbers: relative error {error:.2g}, expected at most {tolerance:g}")
    return error


def experts_table(bench: Bench, model: Model, tokens: Sequence[int], names: Sequence[str], skew: bool = False) -> Table:
    """The experts layer, from router logits to output."""
    shape, device = model.experts, bench.device
    skewed = ", half of all choices on 2 experts" if skew else ""
    table = Table(f"One gpt-oss-{model.name} experts layer{skewed}, microseconds", bench.where, bench.command, [], [])

    def candidate(name: str) -> Candidate:
        make, capture = experts.maker(name, bench.machine)
        layers = [make(shape, random_weights(shape, device, seed)) for seed in range(model.layers)]
        return Candidate(
            name,
            lambda inputs: [
                partial(layer, inputs.x, logits) for layer, logits in zip(layers, inputs.logits, strict=True)
            ],
            experts.TOLERANCE,
            capture,
        )

    candidates = _made(names, candidate, bench, table, "experts")
    table.columns = ["tokens", LIMIT, *(each.name for each in candidates)]
    weights = random_weights(shape, device, 0)
    for done, size in enumerate(tokens):
        bench.show("experts", done, len(tokens))
        inputs = Inputs.random(shape, size, model.layers, device, skew)
        times = time_row(candidates, inputs, Judge.of_experts(weights, shape, inputs), device, table)
        table.add(size, {LIMIT: bench.rates.experts(shape, size, inputs.active_experts(shape.top_k)), **times})
    bench.show("experts", len(tokens), len(tokens))
    return table


def dense_table(bench: Bench, model: Model, layer: str, tokens: Sequence[int], names: Sequence[str]) -> Table:
    """A linear layer."""
    (rows, k), device = model.dense[layer], bench.device
    weights = [torch.randn(rows, k, device=device).bfloat16() for _ in range(dense_copies(rows, k))]
    table = Table(f"{layer} of gpt-oss-{model.name}, {rows} x {k}, microseconds", bench.where, bench.command, [], [])
    kinds: dict[str, dense.Kind] = {}

    def candidate(name: str) -> Candidate:
        kind = kinds[name] = dense.kind(name, bench.machine)
        linears = [kind.make(weight) for weight in weights]
        choices: list[dict[str, int]] = [{"kernel": kernel} for kernel in kind.kernels(k)] or [{}]
        capture = device.type == "cuda"

        def calls(inputs: Inputs) -> Sequence[Callable[[], Tensor]]:
            ways = [[partial(linear, inputs.x, **choice) for linear in linears] for choice in choices]
            return fastest(ways, device, capture)

        return Candidate(name, calls, kind.tolerance, capture)

    candidates = _made(names, candidate, bench, table, layer)
    limits = {name: _limit_name(kinds[name].weight_bytes) for name in table.compared}
    bytes_of = {_limit_name(kinds[name].weight_bytes): kinds[name].weight_bytes for name in table.compared}
    table.limits, table.columns = limits, ["tokens", *bytes_of, *table.compared]
    for done, size in enumerate(tokens):
        bench.show(layer, done, len(tokens))
        x = torch.randn(size, k, device=device).bfloat16()
        inputs, sample = Inputs(x, [x] * len(weights)), sample_of(size, device)
        # Of lm_head's 200,000 columns the first tell as much, and float64 of all would take gigabytes.
        judge = Judge(sample, x[sample].double() @ weights[0][:5120].double().T)
        times = time_row(candidates, inputs, judge, device, table)
        least = {
            name: bench.rates.limit(rows * k * weight_bytes, 2 * size * rows * k)
            for name, weight_bytes in bytes_of.items()
        }
        table.add(size, {**least, **times})
    bench.show(layer, len(tokens), len(tokens))
    return table


def _limit_name(weight_bytes: float) -> str:
    return {
        dense.BF16_BYTES: LIMIT,
        dense.INT8_BYTES: f"{LIMIT} int8",
        dense.FP8_BYTES: f"{LIMIT} fp8",
    }[weight_bytes]


def _made(
    names: Sequence[str], candidate: Callable[[str], Candidate], bench: Bench, table: Table, what: str
) -> list[Candidate]:
    """Those that can be made here; why the others can't goes into the table."""
    made = []
    for name in names:
        bench.show(f"{what}: {name}", 0, 1)
        try:
            made.append(candidate(name))
        except Exception as failure:  # not installed, another version, no memory: one line
            table.left_out[name] = one_line(failure)
            expect_cuda_alive(name, failure, bench.device)
    table.compared = [each.name for each in made]
    return made


def one_line(failure: BaseException) -> str:
    """What went wrong, in one line."""
    said = (str(failure).strip().splitlines() or [""])[0][:200]
    if isinstance(failure, ImportError | AttributeError):
        return f"not importable here: {said}"
    return said or type(failure).__name__


def expect_cuda_alive(
    name: str, failure: BaseException, device: torch.device, remedy: str = "leave it out with --backends"
) -> None:
    """Raises RuntimeError where a kernel has broken the CUDA context, after which nothing in this process works."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        raise RuntimeError(f"{name} broke CUDA for this process ({one_line(failure)}); {remedy}") from None


def chosen(wanted: Sequence[str] | None, default: Sequence[str], all_names: Sequence[str]) -> list[str]:
    """The candidates of a table: those that were asked for, by name or by its beginning ("native": "native-int8")."""
    if wanted is None:
        return list(default)
    return [name for name in all_names if any(name == word or name.startswith(f"{word}-") for word in wanted)]


def report(
    rates: Rates, tables: Sequence[Table], machine: Machine, versions: Mapping[str, str | None]
) -> dict[str, object]:
    """What `--json` prints."""
    return {
        "machine": machine.name,
        "sm": machine.sm,
        "versions": dict(versions),
        "read_bytes_per_microsecond": rates.read,
        "operations_per_microsecond": rates.multiply,
        "tables": [vars(table) for table in tables],
    }
