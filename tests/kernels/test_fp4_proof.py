# SPDX-License-Identifier: Apache-2.0
"""The proof's process with the real FP4 kernels, in the emulator: its own problem and bounds; the layer after it."""

from __future__ import annotations

import ctypes
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.kernels.emulated import Emulated, aligned
from tests.kernels.emulated_fp4 import EmulatedFp4, fp4_configs
from vllm_mxfp4_sm120 import selector
from vllm_mxfp4_sm120.backends.native import Native, backend, fp4, library
from vllm_mxfp4_sm120.fp4 import plan, trial
from vllm_mxfp4_sm120.moe import Activation, MoEShape, reference, topk_softmax
from vllm_mxfp4_sm120.platform import Machine
from vllm_mxfp4_sm120.proof import problem, timing
from vllm_mxfp4_sm120.proof.problem import random_inputs, random_weights, relative_error, scattered

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
BF16_CONFIG = 5  # tokens64 of the other kernels
CARD = Machine((12, 0), (13, 0), "RTX 5090")


def op(emulated: type[Emulated], built: ctypes.CDLL) -> Callable[..., Tensor]:
    """An op of a MoE layer."""

    class Held(emulated):
        def __init__(self, shape: MoEShape, *tensors: Tensor | None) -> None:
            self.library, self.shape = built, shape
            self.w13, self.w2, *self.biases = (None if tensor is None else aligned(tensor) for tensor in tensors)

    def layer(x, w13, w2, w13_bias, w2_bias, logits, ids, gates, expert_map, num_experts, top_k, swiglu, config):
        activation = Activation.SWIGLU_OAI if swiglu else Activation.SILU
        sizes = (num_experts, w2.shape[0], x.shape[1], 32 * w2.shape[2], top_k)
        held = Held(MoEShape(*sizes, w13_bias is not None, activation), w13, w2, w13_bias, w2_bias)
        return held(
            x, logits, BF16_CONFIG if config < 0 else config, expert_map, None, None if ids is None else (ids, gates)
        )

    return layer


@pytest.fixture(autouse=True)
def card(libraries: Callable[[int], ctypes.CDLL], monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of SM 12.0, all of whose kernels are emulated."""
    built = libraries(1200)
    names = fp4_configs(built)
    shape = MoEShape(1, 1, 32, 32, 1)
    EmulatedFp4(built, shape, random_weights(shape, "cpu"))  # says what the library's functions return
    ops = SimpleNamespace(moe_layer=op(Emulated, built), fp4_moe_layer=op(EmulatedFp4, built))
    monkeypatch.setattr(torch.ops, "mxfp4_sm120", ops, raising=False)
    table = tuple(
        fp4.Configuration(name, terms, int(name.rpartition("tokens")[2]), 0, 0) for name, terms in names.items()
    )
    monkeypatch.setattr(fp4, "configurations", lambda: table)
    monkeypatch.setattr(library, "load", lambda: "120f-real")
    monkeypatch.setattr(backend.tuning, "hand_over", lambda device: None)
    monkeypatch.setattr(problem, "TOKENS", (7,))
    monkeypatch.setattr(trial, "TIMED", (1,))
    monkeypatch.setattr(trial, "REPLAYS", 1)
    monkeypatch.setattr(timing, "WARM_UPS", 0)


def test_every_kernel_proves_itself() -> None:
    """On the proof's own problem: outlier columns, a large and a tiny token. Four terms are no less exact than BF16."""
    shape = MoEShape(6, 3, 96, 64, 2)
    answer = trial.solve(asdict(shape), asdict(shape), "cpu")
    assert answer.reason is None
    found = plan.Trial.from_json(answer.found)
    assert found.wrong == {} and {*found.errors} == {
        plan.BF16,
        *plan.kernels_of(4),
        *plan.kernels_of(3),
        *plan.kernels_of(2),
    }
    for terms, low, high in ((4, 1e-3, found.errors[plan.BF16]), (3, 2e-3, 1e-2), (2, 1e-2, 4.5e-2)):
        assert all(low < found.errors[name] <= high for name in plan.kernels_of(terms)), found.errors


def test_the_layer_by_a_plan() -> None:
    """BF16 kernels below 9 tokens, FP4 kernels from there on, with a rank's experts, from logits and from ids."""
    shape = MoEShape(4, 2, 96, 64, 2)
    four = plan.Plan(None, 4, ((8, plan.BF16), (math.inf, "terms4_tokens64")))
    layer = selector.Choice(Native, "default", CARD, activations=four).layer(shape)
    weights, expert_map = random_weights(shape, "cpu"), scattered(shape, "cpu")
    prepared = layer.prepare(weights.clone())
    for tokens in (8, 9):
        x, logits = random_inputs(shape, tokens, "cpu")
        ids, gates = topk_softmax(logits, shape.top_k)
        out = layer.forward_logits(prepared, x, logits, expert_map)
        assert torch.equal(out, layer.forward(prepared, x, ids, gates, expert_map))
        forced = Native(shape)
        forced.fp4_kernels = plan.only("terms4_tokens64")
        same = torch.equal(out, forced.forward_logits(prepared, x, logits, expert_map))
        assert same == (tokens >= 9) and same != torch.equal(
            out, Native(shape).forward_logits(prepared, x, logits, expert_map)
        )
        assert relative_error(out, reference(weights, x, ids, gates, shape.activation, expert_map)) < Native.tolerance
