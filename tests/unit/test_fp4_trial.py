# SPDX-License-Identifier: Apache-2.0
"""What the proof's process finds out about FP4 kernels: which are right, how exact, and how fast."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest

from vllm_mxfp4_sm120 import proof
from vllm_mxfp4_sm120.backends.native import fp4, library
from vllm_mxfp4_sm120.backends.tiled import Tiled
from vllm_mxfp4_sm120.fp4 import plan, trial
from vllm_mxfp4_sm120.fp4.plan import BF16
from vllm_mxfp4_sm120.moe import MoEShape
from vllm_mxfp4_sm120.proof import timing

TABLE = tuple(
    fp4.Configuration(f"terms{terms}_tokens{tokens}", terms, tokens, 128, 1024)
    for terms in (1, 2, 3, 4)
    for tokens in (64, 128)
)
SMALL, LARGE = "terms4_tokens64", "terms4_tokens128"


class Off(Tiled):
    """As BF16 kernels are, and by `error` wrong."""

    error, least = 0.0, 1

    def forward(self, prepared, x, topk_ids, topk_weights, expert_map=None):
        error = self.error if len(x) >= self.least else 0.0
        return super().forward(prepared, x, topk_ids, topk_weights, expert_map) * (1 + error)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """By how much each kernel is off."""
    errors = {config.name: 2 * 10.0**-config.terms for config in TABLE}

    def with_kernel(name, tolerance):
        return type("Kernel", (Off,), {"tolerance": tolerance, "error": errors.get(name, 0.0)})

    monkeypatch.setattr(library, "load", lambda: "120f-real")
    monkeypatch.setattr(fp4, "configurations", lambda: TABLE)
    monkeypatch.setattr(trial, "with_kernel", with_kernel)
    monkeypatch.setattr(trial, "TIMED", (1, 8))
    monkeypatch.setattr(trial, "REPLAYS", 1)
    monkeypatch.setattr(timing, "WARM_UPS", 0)
    return errors


SHAPE, HALF = MoEShape(4, 4, 64, 32, 2), MoEShape(4, 2, 64, 32, 2)


@pytest.mark.parametrize("shape", [SHAPE, HALF], ids=["whole", "half of the experts"])
def test_the_trial(kernels: dict, shape: MoEShape) -> None:
    """Every kernel but those of one term solves the problem and is timed beside BF16's; JSON can hold what is found."""
    answer = trial.solve(asdict(shape), asdict(shape), "cpu")
    assert answer.reason is None and answer.found == json.loads(json.dumps(answer.found))
    names = {BF16, *(config.name for config in TABLE if config.terms > 1)}
    found = plan.Trial.from_json(answer.found)
    assert found.errors.keys() == names and found.wrong == {}
    assert [timed.tokens for timed in found.times] == [1, 8]
    assert all(timed.by_kernel.keys() == names and min(timed.by_kernel.values()) > 0 for timed in found.times)


def test_how_exact_kernels_must_be(kernels: dict) -> None:
    """Four terms as BF16 kernels are: what answers for BF16 isn't less exact. A wrong one isn't timed."""
    kernels |= {SMALL: 5e-3, LARGE: math.nan, "terms3_tokens64": 2e-2, "terms3_tokens128": 5e-3}
    kernels |= {"terms2_tokens64": 5e-2, "terms2_tokens128": 4e-2, "terms1_tokens64": math.nan}
    found = trial.solve(asdict(SHAPE), asdict(SHAPE), "cpu").found
    expected = {
        SMALL: "less exact than BF16: relative error 0.00",
        LARGE: "wrong numbers: relative error nan at 1 tokens, routed, expected at most 0.01",
        "terms3_tokens64": "wrong numbers: relative error 0.02",
        "terms2_tokens64": "wrong numbers: relative error 0.05",
        "terms2_tokens128": "relative error 0.04 of all tokens, expected at most 0.03",
    }
    assert found["wrong"].keys() == expected.keys()
    assert all(found["wrong"][name].startswith(reason) for name, reason in expected.items())
    assert found["times"][0][1].keys() == {BF16, "terms3_tokens128"}


def test_more_tokens_than_the_problem_has(kernels: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is wrong only there is found out by the BF16 kernels' answer, and isn't timed from there on."""
    monkeypatch.setattr(Off, "least", 8)
    kernels[LARGE] = 3e-2
    found = trial.solve(asdict(HALF), asdict(HALF), "cpu").found
    assert found["wrong"] == {LARGE: "0.03 from BF16 kernels' answer at 8 tokens, expected at most 0.02"}
    assert [LARGE in by_kernel for _, by_kernel in found["times"]] == [True, False]


def test_a_small_layer_is_walked_over_as_often_as_a_model_has_layers(
    kernels: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not until no cache holds them: of models/gpt-oss-small those were hundreds, and gigabytes of answers."""
    walked: list[int] = []

    def per_call(calls: dict, *given: object) -> dict[str, float]:
        walked.extend(len(layers) for layers in calls.values())
        return dict.fromkeys(calls, 1.0)

    monkeypatch.setattr(timing, "copies_beyond_cache", lambda *given: 551)
    monkeypatch.setattr(timing, "per_call", per_call)
    assert trial.solve(asdict(SHAPE), asdict(SHAPE), "cpu").reason is None
    assert {*walked} == {timing.GRAPH_CALLS}


def test_a_kernel_that_raises_and_bf16_kernels_that_are_wrong(kernels: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels[SMALL] = "not a number"
    answer = trial.solve(asdict(SHAPE), asdict(SHAPE), "cpu")
    assert answer.reason.startswith(f"{SMALL}: TypeError: ") and not answer.final
    monkeypatch.setattr(trial, "with_kernel", lambda name, tolerance: type("Kernel", (Off,), {"error": 0.5}))
    answer = trial.solve(asdict(SHAPE), asdict(SHAPE), "cpu")
    assert answer.reason.startswith("bf16: wrong numbers: relative error 0.5") and answer.final


def test_in_a_process_of_its_own() -> None:
    """What is asked gets there; here there is no library to ask."""
    shape = asdict(SHAPE)
    answer = proof.run_in_child(plan.TRIAL, {"layer": shape, "problem": shape, "device": "cpu"}, 120)
    assert answer.reason.startswith("OSError: Could not load this library") and not answer.final
