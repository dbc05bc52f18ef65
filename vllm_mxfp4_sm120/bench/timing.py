# SPDX-License-Identifier: Apache-2.0
"""How a time is taken: CUDA graphs that walk over several layers' weights, candidates that take turns, medians.

On a CPU, and for what no CUDA graph can hold, the same calls run one by one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WARM_UPS = 3  # replays that don't count: caches and clocks settle
Call = Callable[[], object]


@dataclass(frozen=True)
class Walk:
    """A pass over several layers' weights, so that no cache holds the next call's: `run` makes `calls` of them.

    `outputs` gives the last pass's answers, a layer each.
    """

    run: Call
    calls: int
    outputs: Callable[[], Sequence[Tensor]]

    def answers(self) -> Sequence[Tensor]:
        """Run once, with NaN where the answers of the last run lay, so that what isn't written is noticed."""
        for output in self.outputs():
            output.fill_(torch.nan)
        self.run()
        return self.outputs()


def walk_over(layers: Sequence[Callable[[], Tensor]], walks: int = 1, capture: bool = False) -> Walk:
    """A walk over all layers, so many times; with `capture`, as a CUDA graph."""
    outputs: list[Tensor] = []

    def run() -> None:
        for _ in range(walks):
            outputs[:] = [layer() for layer in layers]

    if not capture:
        return Walk(run, walks * len(layers), lambda: outputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return Walk(graph.replay, walks * len(layers), lambda: outputs)


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
