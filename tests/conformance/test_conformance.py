# SPDX-License-Identifier: Apache-2.0
"""Every backend against float64 on random layers, inputs and routings. See suite.py; `--replay FILE` runs one again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from tests.conformance.cases import Case
from tests.conformance.suite import EMULATED, Failure, Subject, draw, first_failure, seeds
from vllm_mxfp4_sm120 import mxfp4
from vllm_mxfp4_sm120.backends.tiled import Tiled
from vllm_mxfp4_sm120.moe import reference

# A backend's part of the cases that --conformance-cases says: 500 in CI.
SHARE = {"tiled": 0.6, "upcast": 0.1, "triton": 0.05, EMULATED: 0.25}
ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--conformance-seed")


@pytest.fixture
def cases(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--conformance-cases")


def assert_right(subject: Subject, seed: int, count: int, shapes: int | None = None) -> None:
    print(f"{subject.name}: {count} cases from seed {seed}")
    if (failure := first_failure(subject, draw(seed, count, shapes))) is not None:
        pytest.fail(failure.report(), pytrace=False)


@pytest.mark.parametrize("name", ["tiled", "upcast"])
def test_plain_torch(name, seed, cases):
    assert_right(Subject.named(name), seed, round(cases * SHARE[name]))


def run_alone(backend: str, seed: int, cases: float) -> None:
    """In a process of its own: an emulator that finds a hang aborts, and Triton must be told before it is imported."""
    count = str(max(1, round(cases * SHARE[backend])))
    done = subprocess.run(
        [sys.executable, "-m", "tests.conformance.suite", backend, "--cases", count, "--seed", str(seed)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_triton_under_its_interpreter(seed, cases):
    run_alone("triton", seed, cases)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_native_in_its_emulator(seed, cases):
    """In two processes at a time, of a seed each: the emulator has one thread, and takes longer than all the rest."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(run_alone, [EMULATED] * 2, [seed, seed + 1], [cases / 2] * 2))


def test_replay(request):
    """What --replay names."""
    failure = Failure.read(Path(request.config.getoption("--replay")))
    said = Subject.named(failure.subject, request.config.getoption("--conformance-device")).complaint(failure.case)
    assert said is None, f"{said}\n{failure.case}"


@pytest.mark.parametrize("case_seed", [*seeds(17, 6)])
def test_the_reference_is_transformers_experts(case_seed):
    """GptOssExperts in float64, called with the same choice of experts: clamps, biases and gates included."""
    case = replace(Case.draw(case_seed), activation="swiglu_oai", scales="rows", bias="large", local="all", tokens=9)
    case = replace(case, ids="int64", x="ordinary")
    given = case.tensors()
    weights = given.weights
    config = GptOssConfig(
        num_local_experts=case.experts,
        hidden_size=32 * case.hidden_blocks,
        intermediate_size=32 * case.intermediate_blocks,
        num_experts_per_tok=case.top_k,
    )
    config._experts_implementation = "eager"
    theirs = GptOssExperts(config).double()
    with torch.no_grad():
        theirs.gate_up_proj.copy_(mxfp4.dequantize(weights.w13, weights.w13_scale, torch.float64).mT)
        theirs.gate_up_proj_bias.copy_(weights.w13_bias)
        theirs.down_proj.copy_(mxfp4.dequantize(weights.w2, weights.w2_scale, torch.float64).mT)
        theirs.down_proj_bias.copy_(weights.w2_bias)
        expected = theirs(given.x.double(), given.topk_ids, given.topk_weights.double())
    ours = reference(weights, given.x, given.topk_ids, given.topk_weights)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


class Forgetful(Tiled):
    """Leaves out the last token, where there are more than two."""

    def forward(self, prepared, x, topk_ids, topk_weights, expert_map=None):
        out = super().forward(prepared, x, topk_ids, topk_weights, expert_map)
        out[2:][-1:] = 0
        return out


def test_a_failure_is_shrunk_and_can_be_replayed(tmp_path, seed):
    subject = Subject("forgetful", Forgetful, 3.5e-3)
    failure = first_failure(subject, draw(seed, 50))
    assert failure is not None and failure.case.tokens == 3
    assert failure.case == Case(failure.case.seed, tokens=3, bias=failure.case.bias)
    path = failure.write(tmp_path)
    assert Failure.read(path) == failure
    assert json.loads(path.read_text())["case"] == asdict(failure.case)
    assert subject.complaint(Failure.read(path).case) == failure.complaint
