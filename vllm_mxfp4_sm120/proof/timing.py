# SPDX-License-Identifier: Apache-2.0
"""How a time is taken: CUDA graphs that walk over several layers' weights, candidates that take turns, medians.

On a CPU, and for what no CUDA graph can hold, the same calls run one by one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

WARM_UPS = 3  # replays that don't count: caches and clocks settle
# Of short calls a graph makes as many as gpt-oss-20b has layers: its own launch takes some 4 microseconds.
GRAPH_CALLS = 24
ROTATED = 3  # times the L2 cache: so many bytes of weights are walked over, so that it never holds the next call's
Call = Callable[[], object]


@dataclass(frozen=True)
class Walk:
    """A pass over several layers' weights, so that no cache holds the next call's: `run` makes `calls` of them.

    `outputs` are the last pass's answers, a layer each.
    """

    run: Call
    calls: int
    outputs: list[Tensor]

    def answers(self) -> list[Tensor]:
        """Run once, with NaN where the answers of the last run lay, so that what isn't written is noticed."""
        for output in self.outputs:
            output.fill_(torch.nan)
        self.run()
        return self.outputs


def walk_over(layers: Sequence[Callable[[], Tensor]], walks: int = 1, capture: bool = False) -> Walk:
    """A walk over all layers, so many times; with `capture`, as a CUDA graph.

    All graphs take their memory from one pool, and reuse what the others have let go of: fine for graphs that never run
    at once and hand nothing on. Whoever keeps many of them clears their outputs.
    """
    outputs: list[Tensor] = []

    def run() -> None:
        for _ in range(walks):
            outputs[:] = [layer() for layer in layers]

    if not capture:
        return Walk(run, walks * len(layers), outputs)
    stream = _warm_up_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    outputs.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_first_graph(torch.cuda.current_device()).pool()):
        run()
    return Walk(graph.replay, walks * len(layers), outputs)


@cache
def _warm_up_stream(device: int) -> torch.cuda.Stream:
    """One for all graphs: the native library keeps a workspace for each stream that it has ever seen."""
    return torch.cuda.Stream(device)


@cache
def _first_graph(device: int) -> torch.cuda.CUDAGraph:
    """Its pool is that of all others. It stays, for a pool whose last graph is gone can't be captured into again."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.zeros(1, device=f"cuda:{device}")
    return graph


def interleaved(calls: Mapping[str, Call], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Microseconds of each call, `repeats` of them; they take turns, for clocks change with power and warmth."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(-WARM_UPS, repeats):
        for name, call in calls.items():
            elapsed = _on_gpu(call) if device.type == "cuda" else _on_cpu(call)
            if repeat >= 0:
                times[name].append(elapsed)
    return times


def medians(calls: Mapping[str, Call], device: torch.device, repeats: int) -> dict[str, float]:
    """The median microseconds of each call."""
    return {name: statistics.median(times) for name, times in interleaved(calls, device, repeats).items()}


def per_call(
    calls: Mapping[str, Sequence[Callable[[], Tensor]]], device: torch.device, repeats: int, again: int = 1
) -> dict[str, float]:
    """Microseconds of one call of each, where all walk over their layers' calls, on a GPU in CUDA graphs: medians."""
    walks = {}
    for name, layers in calls.items():
        walks[name] = walk_over(layers, again, capture=device.type == "cuda")
        walks[name].outputs.clear()  # the next graph's lie in the same memory
    times = medians({name: walk.run for name, walk in walks.items()}, device, repeats)
    return {name: time / walks[name].calls for name, time in times.items()}


def copies_beyond_cache(layer_bytes: int, device: torch.device) -> int:
    """How many copies of a layer's weights to walk over."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1
    return -(-ROTATED * cache // layer_bytes)


def _on_gpu(call: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def _on_cpu(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6
