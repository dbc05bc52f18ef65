# SPDX-License-Identifier: Apache-2.0
"""What the proof's process does with FP4 kernels: the proof's problem with each, then all beside BF16's, timed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from vllm_mxfp4_sm120.backends.native import Native, fp4, library
from vllm_mxfp4_sm120.bench.models import Inputs, random_weights
from vllm_mxfp4_sm120.fp4.plan import BF16, TERMS, only
from vllm_mxfp4_sm120.memory import packed_bytes
from vllm_mxfp4_sm120.moe import MoEShape
from vllm_mxfp4_sm120.proof import timing
from vllm_mxfp4_sm120.proof.problem import Problem, Proof, relative_error, scattered, shape_of

# Below, an expert of gpt-oss-20b has less than 8 tokens on average, and weights take the time, which are the same
# bytes for both; the last is what kernels take at once.
TIMED = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
REPLAYS = 7
# Largest relative error of a token, by terms; three and four are held to what the BF16 kernels are. Of two terms, in a
# simulation on a CPU, the proof's tokens have 2.4e-2 in the mean, and the one that is 16 times as large as the others
# 3.3e-2.
TOLERANCE = {4: Native.tolerance, 3: Native.tolerance, 2: 4.5e-2}
# All tokens of a call together, root mean square: what two terms are to keep.
TWO_TERMS, MEAN_OF_TWO = 2, 3e-2
# What answers where BF16 was asked for has at most so many times the BF16 kernels' own error on the same problem.
NO_LESS_EXACT = 1.15


def solve(layer: dict[str, Any], problem: dict[str, Any], device: str) -> Proof:
    """`layer` and `problem` are fields of a MoEShape: what will be served, and what is solved. `found`: a `Trial`."""
    found: dict[str, dict[str, float]] = {}
    wrong: dict[str, str] = {}
    try:
        library.load()
        if torch.device(device).type == "cuda":
            torch.cuda.set_device(device)
        kernels, solved = backends(), Problem(shape_of(problem), device)
        for name, kernel in kernels.items():
            answer = solved.judge(kernel)
            if answer.reason is None:
                found[name] = answer.found
            elif name == BF16 or not answer.final:
                return replace(answer, reason=f"{name}: {answer.reason}")
            else:
                wrong[name] = answer.reason
        del solved
        wrong |= inexact(found)
        times = list(timings(kernels, wrong, shape_of(layer), torch.device(device)))
    except Exception as error:
        return Proof.of_error(error)
    errors = {name: each["error"] for name, each in found.items()}
    return Proof(None, found={"errors": errors, "wrong": wrong, "times": times})


def backends() -> dict[str, type[Native]]:
    """By kernel: the backend that takes it for every call. BF16's are as they are served."""
    found = {BF16: with_kernel(BF16, Native.tolerance)}
    for config in fp4.configurations():
        if config.terms in TERMS.values():
            found[config.name] = with_kernel(config.name, TOLERANCE[config.terms])
    return found


def with_kernel(name: str, error: float) -> type[Native]:
    """The backend that computes every call with this FP4 kernel, or with those for `BF16`."""

    class WithKernel(Native):
        fp4_kernels = only(name)
        has_router = False
        tolerance = error

    return WithKernel


def inexact(found: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Why not, by kernel: those of four terms that are worse than BF16's, those of two that are too far off."""
    wrong = {}
    for config in fp4.configurations():
        error, mean = (found.get(config.name, {}).get(kind, 0.0) for kind in ("error", "mean"))
        most = NO_LESS_EXACT * found[BF16]["error"]
        if config.terms == TERMS[BF16] and error > most:
            wrong[config.name] = f"less exact than BF16: relative error {error:.2g}, expected at most {most:.2g}"
        if config.terms == TWO_TERMS and mean > MEAN_OF_TWO:
            wrong[config.name] = f"relative error {mean:.2g} of all tokens, expected at most {MEAN_OF_TWO}"
    return wrong


def timings(
    kernels: Mapping[str, type[Native]], wrong: dict[str, str], shape: MoEShape, device: torch.device
) -> Iterator[list[Any]]:
    """Of the layer as it will be served, at each size: the tokens, and microseconds by kernel that isn't `wrong`.

    Which are wrong at more tokens than the proof's problem has is added to them.
    """
    # As many as a model has layers: of a small one's layers a cache holds them all, there as here.
    copies = min(timing.GRAPH_CALLS, timing.copies_beyond_cache(packed_bytes(shape), device))
    prepared = [kernels[BF16](shape).prepare(random_weights(shape, device, seed)) for seed in range(copies)]
    expert_map = scattered(shape, device)
    for tokens in TIMED:
        inputs = Inputs.random(shape, tokens, copies, device)
        calls = {
            name: [
                partial(kernel(shape).forward_logits, weights, inputs.x, logits, expert_map)
                for weights, logits in zip(prepared, inputs.logits, strict=True)
            ]
            for name, kernel in kernels.items()
            if name not in wrong
        }
        right = calls[BF16][0]().double()
        for name in [name for name in calls if name != BF16]:
            error, most = relative_error(calls[name][0](), right), kernels[name].tolerance + Native.tolerance
            if not error <= most:  # NaN fails too
                wrong[name] = f"{error:.2g} from BF16 kernels' answer at {tokens} tokens, expected at most {most:.2g}"
                del calls[name]
        times = timing.per_call(calls, device, REPLAYS)
        yield [tokens, {name: round(time, 1) for name, time in times.items()}]
