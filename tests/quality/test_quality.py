# SPDX-License-Identifier: Apache-2.0
"""The small model through the engine: as good as transformers' with every backend, and worse with every fault."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from quality import SMALL

from tests.quality.faults import (
    FAULTS,
    KL_MEAN_BOUND,
    KL_P99_BOUND,
    MEASURED,
    NO_FAULT,
    PERPLEXITY_BOUND,
    README,
    moved,
    perplexity_change,
    render,
)
from tests.quality.judge import LONG, LONG_PROMPTS
from tests.quality.long_answers import LEAD_BOUND, SAME_EXPERTS

ROOT = Path(__file__).parents[2]
ENV = {
    "OMP_NUM_THREADS": "1",  # faster for matrices as small as this model's
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TRITON_INTERPRET": "1",
    "HF_HUB_OFFLINE": "1",  # nothing may reach for the network
    "VLLM_NO_USAGE_STATS": "1",
}

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="made for CPUs: on a GPU run benchmarks/quality.py --b backend=NAME",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What judge.py says, in a process of its own."""
    folder = tmp_path_factory.mktemp("quality")
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    with (folder / "log").open("w") as log:
        subprocess.run(
            [sys.executable, "-m", "tests.quality.judge", str(folder / "found.json")],
            cwd=ROOT,
            check=True,
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=900,
            env={**os.environ, **ENV, "PYTHONPATH": path},
        )
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("backend", ["auto", "tiled", "upcast", "reference"])
def test_a_backend_is_as_good_as_transformers(found: dict[str, Any], backend: str) -> None:
    figures = found["backends"][backend]
    assert abs(perplexity_change(figures)) < PERPLEXITY_BOUND
    assert figures["kl_mean"] < KL_MEAN_BOUND and figures["kl_p99"] < KL_P99_BOUND


def test_what_is_recorded_is_what_the_engine_answers_with(found: dict[str, Any]) -> None:
    """Row for row: in any other order perplexity would be thousands."""
    assert found["backends"]["auto"]["perplexity_b"] == pytest.approx(found["own_perplexity"], rel=1e-5)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_triton_interpreted_is_as_good_as_transformers(found: dict[str, Any]) -> None:
    """On 127 tokens. The interpreter truncates to BF16 where GPUs round, which makes twice the distance."""
    figures = found["backends"]["triton"]
    assert figures["tokens"] == 127
    assert abs(perplexity_change(figures)) < PERPLEXITY_BOUND
    assert figures["kl_mean"] < 2 * KL_MEAN_BOUND and figures["kl_p99"] < 2 * KL_P99_BOUND


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_seen(found: dict[str, Any], fault: Any) -> None:
    assert moved(found["faults"][fault.name])


def test_no_fault_is_none(found: dict[str, Any]) -> None:
    """Built and put in the same way, from unchanged source."""
    assert not moved(found["faults"][NO_FAULT])


def test_the_table_is_what_is_measured(found: dict[str, Any]) -> None:
    """On another CPU rounding differs: a tenth of a figure, and what no fault moves, are left to it."""
    measured = json.loads(MEASURED.read_text())
    assert README.read_text() == render(measured), "PYTHONPATH=.:benchmarks python -m tests.quality.judge"
    assert set(measured) == set(found["faults"])
    for name, figures in measured.items():
        for key, room in (("perplexity_b", PERPLEXITY_BOUND), ("kl_mean", KL_MEAN_BOUND), ("kl_p99", KL_P99_BOUND)):
            assert figures[key] == pytest.approx(found["faults"][name][key], rel=0.1, abs=room), (name, key)


def test_long_answers_differ_only_where_two_tokens_are_as_good(found: dict[str, Any]) -> None:
    """Judged by transformers in float32 that uses the experts which the engine chose; some places do differ."""
    leads = [lead for judges in found["long_answers"].values() for lead in judges[SAME_EXPERTS]]
    assert len(leads) <= 0.02 * LONG * len(LONG_PROMPTS)
    assert max(leads, default=0) < LEAD_BOUND


def test_the_first_completion_is_in_words_of_the_text(found: dict[str, Any]) -> None:
    known = set(re.findall(r"[a-z]+", (SMALL / "heldout.txt").read_text().lower()))
    words = re.findall(r"[a-z]+", found["completion"].lower())
    assert len(set(words)) >= 10
    assert sum(word in known for word in words) >= 0.9 * len(words)
