# SPDX-License-Identifier: Apache-2.0
"""What a GPU has to say: its kernels, and how long each takes, once its answer was right."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from vllm_mxfp4_sm120.backends import triton
from vllm_mxfp4_sm120.backends.base import Backend, Prepared
from vllm_mxfp4_sm120.backends.native import Native, library
from vllm_mxfp4_sm120.backends.native import tuning as native_tuning
from vllm_mxfp4_sm120.backends.triton import Tiles, Triton
from vllm_mxfp4_sm120.backends.tuning import Bound, Family, Rule, choose
from vllm_mxfp4_sm120.bench.experts import TOLERANCE
from vllm_mxfp4_sm120.bench.measure import checked, expect_cuda_alive, one_line, walks_of
from vllm_mxfp4_sm120.bench.models import Inputs, Judge, Model, model, random_weights
from vllm_mxfp4_sm120.fp4 import plan
from vllm_mxfp4_sm120.platform import Machine
from vllm_mxfp4_sm120.proof import timing
from vllm_mxfp4_sm120.tune.session import ROUNDS, Job, Timed
from vllm_mxfp4_sm120.tune.sizes import Size, around, grid

# FP4 kernels are timed from so many tokens on: below, an expert has a few, and weights take the time.
FIRST = 64
REPLAYS = 5  # of a kernel in each round; their median is the round's
# Tiles worth trying against those of a rule, by block_m: all are multiples that the kernels' MMA takes, and what asks
# for more shared memory or registers than the card has fails when it is compiled, and is left out.
TRIED = {
    16: "16x64x128w4s4 16x64x256w4s3 16x32x256w4s4 16x32x128w2s5 16x128x128w4s4 16x64x64w4s6 16x128x128w8s4 "
    "16x64x128w2s4",
    64: "64x128x64w4s4 64x256x64w8s4 32x128x128w4s3 64x128x128w4s3 64x128x64w8s4 32x128x64w4s4 32x64x128w4s4 "
    "64x64x128w4s4",
    128: "128x256x64w8s4 128x256x64w8s3 128x128x64w8s4 128x128x64w4s4 128x128x128w8s3 128x256x128w8s3 64x256x64w8s4 "
    "256x128x64w8s3",
}


def jobs(card: str, models: Sequence[Model]) -> list[Job]:
    """What there is to tune on this card: the library's kernels, and Triton's tiles where Triton is installed.

    The library must be loaded. Raises ValueError as `tuning.find`.
    """
    most = library.limits().tokens
    rule = native_tuning.found(card).rule
    shapes = {each.name: each.experts for each in models}

    def able(size: Size) -> list[str]:
        shape = shapes[size.model]
        width = max(shape.hidden_size, shape.intermediate_size)
        return [each.name for each in library.configurations() if each.takes(size.tokens, size.top_k, width)]

    def sizes(rule: Rule) -> tuple[Size, ...]:
        return tuple(size for each in models for size in around(rule, each.name, each.experts, most))

    found = [Job(Family.NATIVE, library.version(), rule, sizes(rule), able)]
    if importlib.util.find_spec("triton") is not None:
        tiles = triton.found(card).rule
        found.append(Job(Family.TRITON, triton.version(), tiles, sizes(tiles), partial(tried, tiles)))
    return found


def fp4_jobs(machine: Machine, models: Sequence[Model]) -> list[Job]:
    """From how many tokens on four FP4 terms are faster than BF16: at many sizes, for nobody knows a border yet.

    With the models of whose sizes they have proved themselves: a kernel that crashes would end the whole run. None
    where they can't run. The library must be loaded.
    """
    models = [each for each in models if plan.make(machine, each.experts, plan.BF16).reason is None]
    if not models:
        return []
    own, most = plan.own_rule(machine.name), library.limits().tokens
    rule = own.rule if own is not None else (Bound(plan.BF16),)
    sizes: set[Size] = set()
    for each in models:
        sizes.update(grid(each.name, each.experts, FIRST, most), around(rule, each.name, each.experts, most))
    kernels = [plan.BF16, *plan.kernels_of(plan.TERMS[plan.BF16])]
    return [Job(Family.FP4, library.version(), rule, tuple(sorted(sizes)), lambda size: kernels)]


def tried(rule: Rule, size: Size) -> list[str]:
    """A rule's own tiles, and those that compete with the ones that it takes for this size."""
    own = [bound.kernel for bound in rule]
    block_m = Tiles.parse(choose(rule, size.tokens, size.tokens_per_expert)).block_m
    group = min((key for key in TRIED if key >= block_m), default=max(TRIED))
    return list(dict.fromkeys([*own, *TRIED[group].split()]))


class OnGpu:
    """Times kernels on a device. Keeps one model's weights in one backend's layout at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._key: tuple[Family, str] | None = None

    @torch.inference_mode()
    def __call__(self, family: Family, size: Size, kernels: Sequence[str]) -> Timed:
        """Raises RuntimeError where a kernel breaks CUDA for this process, or the card's memory is too small."""
        try:
            self._load(family, size.model)
            sizes = model(size.model)
            inputs = Inputs.random(sizes.experts, size.tokens, sizes.layers, self.device)
            judge = Judge.of_experts(self._weights, sizes.experts, inputs)
            return self._timed(family, sizes, inputs, judge, kernels)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"{size.model}, {size.tokens} tokens: {one_line(error)}; end what else uses the card, or give --model"
            ) from None

    def _timed(self, family: Family, sizes: Model, inputs: Inputs, judge: Judge, kernels: Sequence[str]) -> Timed:
        walks, failed = {}, {}
        for kernel in kernels:
            layer = _fixed(family, sizes, kernel)
            calls = [partial(layer, each, inputs.x, inputs.logits[i]) for i, each in enumerate(self._prepared)]
            try:
                repeats = walks_of(sizes.layers, len(inputs.x), self.device)
                walk = timing.walk_over(calls, repeats, capture=self.device.type == "cuda")
                checked(walk, judge, TOLERANCE)
                walk.outputs.clear()
            except torch.OutOfMemoryError:
                raise
            except Exception as failure:  # wrong numbers, a kernel that doesn't fit on this card
                failed[kernel] = one_line(failure)
                expect_cuda_alive(kernel, failure, self.device, "nothing was written; please report it")
                continue
            walks[kernel] = walk
        rounds: dict[str, list[float]] = {kernel: [] for kernel in walks}
        for _ in range(ROUNDS):
            for kernel, time in timing.medians({k: w.run for k, w in walks.items()}, self.device, REPLAYS).items():
                rounds[kernel].append(time / walks[kernel].calls)
        return Timed(rounds, failed)

    def _load(self, family: Family, name: str) -> None:
        """Weights of as many layers as are walked over, and the first layer's as they are for the judge."""
        if self._key == (family, name):
            return
        self._key, self._prepared = None, []
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        sizes = model(name)
        layer = (Triton if family is Family.TRITON else Native)(sizes.experts)
        self._weights = random_weights(sizes.experts, self.device, 0)
        for seed in range(sizes.layers):
            self._prepared.append(layer.prepare(random_weights(sizes.experts, self.device, seed)))
        self._key = family, name


def _fixed(family: Family, sizes: Model, kernel: str) -> Callable[[Prepared, Tensor, Tensor], Tensor]:
    """A layer that takes this kernel, whatever the rule says."""
    layer: Backend
    if family is Family.NATIVE:
        layer = native = Native(sizes.experts)
        native.configuration = [each.name for each in library.configurations()].index(kernel)
    elif family is Family.FP4:
        layer = native = Native(sizes.experts)
        native.fp4_kernels = plan.only(kernel)
    else:
        layer = tiled = Triton(sizes.experts)
        tiled.tiles = Tiles.parse(kernel)
    return layer.forward_logits
