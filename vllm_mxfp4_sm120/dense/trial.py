# SPDX-License-Identifier: Apache-2.0
"""What the proof's process does with dense kernels: each against float64, then all of them against torch, timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vllm_mxfp4_sm120.backends.native import library
from vllm_mxfp4_sm120.dense import native
from vllm_mxfp4_sm120.dense.int8 import Int8Weights
from vllm_mxfp4_sm120.dense.linear import LinearShape, torchs_linear
from vllm_mxfp4_sm120.dense.native import DenseConfiguration
from vllm_mxfp4_sm120.dense.plan import Timing
from vllm_mxfp4_sm120.proof import timing
from vllm_mxfp4_sm120.proof.problem import LARGE_TOKEN, TINY_TOKEN, Proof, relative_error

# Less than each kernel takes at once, all of that, and more.
CHECKED = (1, 7, 16, 17, 32, 33, 64, 65, 128, 150, 256)
# Those for which vLLM captures CUDA graphs, up to what a kernel takes: what is decoded has one of these sizes.
TIMED = (1, 2, 4, *range(8, 257, 8))
# Of a token, or of a row over all tokens. Rounding to BF16 makes 1.7e-3, once for the output, and in some kernels once
# for a weight after its scale: 2.4e-3 in all, and some more where few values make the average.
TOLERANCE = 4e-3
LARGEST_OUTPUT = 1 << 24  # rows times columns of weights that are in float64 at once
REPLAYS = 7
READINGS = 4  # of the weights: with more of them no kernel was ever the fastest
LARGE = 1 << 28  # bytes of weights, of which one call in a graph is long enough
TORCHS = "torch"  # its name among the kernels'


@dataclass(frozen=True)
class Problem:
    """Random weights of a layer's own shape, a size of their own for each row; `scale` None for BF16 weights."""

    shape: LinearShape
    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None
    row_sizes: Tensor  # float64 [N]

    @classmethod
    def random(cls, shape: LinearShape, device: torch.device | str) -> Problem:
        draw: Any = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        sizes = torch.randint(-4, 5, (shape.rows, 1), **draw).double().exp2()
        weight = torch.randn(shape.rows, shape.columns, dtype=torch.bfloat16, **draw)
        weight *= sizes.bfloat16()
        bias = (torch.randn(shape.rows, **draw) * sizes[:, 0]).bfloat16() if shape.bias else None
        if not shape.int8:
            return cls(shape, weight, None, bias, sizes[:, 0])
        encoded = Int8Weights.quantize(weight)
        return cls(shape, encoded.codes, encoded.scales, bias, sizes[:, 0])

    def copies(self) -> list[Problem]:
        """Enough of them to walk over."""
        device = self.weight.device
        more = timing.copies_beyond_cache(self.weight.nbytes, device) - 1
        return [self, *(replace(self, weight=self.weight.clone(), scale=self._scale()) for _ in range(more))]

    def _scale(self) -> Tensor | None:
        return None if self.scale is None else self.scale.clone()

    def ours(self, x: Tensor, kernel: int) -> Tensor:
        return native.linear(x, self.weight, self.bias, self.scale, kernel)

    def torchs(self, x: Tensor) -> Tensor:
        return torchs_linear(x, self.weight, self.scale, self.bias, native.dequantize)

    def reference(self, x: Tensor) -> Tensor:
        """float64 [M, N], a few rows of the weights at a time."""
        parts = []
        for rows in torch.arange(self.shape.rows, device=x.device).split(max(1, LARGEST_OUTPUT // self.shape.columns)):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            exact = self.weight[part].double()
            if self.scale is not None:
                exact = Int8Weights(self.weight[part], self.scale[:, part]).decode(dtype=torch.float64)
            parts.append(x.double() @ exact.T + (0 if self.bias is None else self.bias[part].double()))
        return torch.cat(parts, 1)


def solve(shapes: list[list[Any]], device: str) -> Proof:
    """`shapes` are fields of `LinearShape`. The proof's `found`: by a shape's text, fields of a `Timing` a size.

    Of a shape that no kernel takes there are none.
    """
    try:
        library.load()
        if torch.device(device).type == "cuda":
            torch.cuda.set_device(device)
        found: dict[str, list[list[Any]]] = {}
        for shape in (LinearShape(*fields) for fields in shapes):
            if shape.columns % native.limits().k_multiple:
                found[str(shape)] = []
                continue
            problem = Problem.random(shape, device)
            if (reason := what_is_wrong(problem)) is not None:
                return Proof(f"{shape}: {reason}")
            found[str(shape)] = [list(vars(time).values()) for time in timings(problem)]
    except Exception as error:
        return Proof.of_error(error)
    return Proof(None, found=found)


def inputs(shape: LinearShape, tokens: int, device: torch.device | str) -> Tensor:
    """bf16 [M, K]; of three tokens and more the second is large and the third tiny."""
    x = torch.randn(tokens, shape.columns, generator=torch.Generator(device).manual_seed(1), device=device)
    if tokens > 2:
        x[1], x[2] = x[1] * LARGE_TOKEN, x[2] * TINY_TOKEN
    return x.bfloat16()


def what_is_wrong(problem: Problem) -> str | None:
    """With the answers of any of the kernels, one line; None if all are right."""
    if problem.scale is not None:
        weights = Int8Weights(problem.weight, problem.scale)
        if not torch.equal(native.dequantize(weights.codes, weights.scales), weights.decode(dtype=torch.bfloat16)):
            return "wrong numbers: INT8 weights decoded to BF16 aren't what torch makes of them"
    x = inputs(problem.shape, max(CHECKED), problem.weight.device)
    right = problem.reference(x) / problem.row_sizes
    # So that each token counts as much as any other in a row's error: else it is the large one's alone.
    token_sizes = right.square().mean(1, keepdim=True).sqrt()
    right /= token_sizes
    for kernel, config in kernels(problem.shape):
        for tokens in CHECKED:
            out = problem.ours(x[:tokens], kernel)
            if out.shape != right[:tokens].shape or out.dtype != x.dtype:
                return f"{config.name} answered {out.dtype} {list(out.shape)}"
            answer = out / problem.row_sizes / token_sizes[:tokens]
            error = relative_error(answer, right[:tokens])
            if tokens == max(CHECKED):
                error = max(error, relative_error(answer.T, right.T))
            if not error <= TOLERANCE:  # NaN fails too
                at = f"{error:.2g} at {tokens} tokens, {config.name}"
                return f"wrong numbers: relative error {at}, expected at most {TOLERANCE}"
    return None


def kernels(shape: LinearShape, tokens: int = 1) -> Iterator[tuple[int, DenseConfiguration]]:
    """Those of the library that take the shape, by number, and read the weights at most `READINGS` times."""
    for number, config in enumerate(native.configurations()):
        if config.int8 == shape.int8 and tokens <= READINGS * config.tokens:
            yield number, config


def timings(problem: Problem) -> Iterator[Timing]:
    """At each size that any of our kernels takes well, the fastest of them, and torch's."""
    copies = problem.copies()
    for tokens in TIMED:
        if not any(kernels(problem.shape, tokens)):
            continue
        times = times_at(tokens, copies)
        torchs = times.pop(TORCHS)
        name = min(times, key=times.__getitem__)
        yield Timing(tokens, name, round(times[name], 2), round(torchs, 2))


def times_at(tokens: int, copies: list[Problem]) -> dict[str, float]:
    """Microseconds of torch's linear, and of `kernels`."""
    shape, device = copies[0].shape, copies[0].weight.device
    x = inputs(shape, tokens, device)
    calls: dict[str, Callable[[Problem], Tensor]] = {TORCHS: lambda copy: copy.torchs(x)}
    for number, config in kernels(shape, tokens):
        calls[config.name] = partial(Problem.ours, x=x, kernel=number)
    return microseconds(calls, copies, device)


def microseconds(
    calls: Mapping[str, Callable[[Problem], Tensor]], copies: list[Problem], device: torch.device
) -> dict[str, float]:
    """Of one call each, in CUDA graphs that walk over the copies, as it is served: medians, all of them in turn."""
    again = max(1, timing.GRAPH_CALLS // len(copies)) if copies[0].weight.nbytes < LARGE else 1
    layers = {name: [partial(call, copy) for copy in copies] for name, call in calls.items()}
    return timing.per_call(layers, device, REPLAYS, again)
