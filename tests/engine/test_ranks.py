# SPDX-License-Identifier: Apache-2.0
"""Engines of two ranks answer as one rank does, each with its part of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import CompilationMode

from tests.engine.conftest import TOLERANCE, Answers, assert_ours, generate
from vllm_mxfp4_sm120.selector import Choice

# On CPUs vLLM makes room for what a pipeline's second rank receives only as it compiles.
TRACED_ONLY = {"compilation_config": {"mode": CompilationMode.DYNAMO_TRACE_ONCE, "backend": "eager"}}
DENSE = {"additional_config": {"mxfp4_sm120": {"dense": "bf16"}}}


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two GPUs, or none")
@pytest.mark.parametrize(
    ("ranks", "engine"),
    [
        # 3 and 2 of the 5 blocks of I. Spawned: what vLLM hands to a rank is pickled.
        ({"tp": 2}, {"enforce_eager": True, "tensor_parallel_size": 2, "spawn": True}),
        ({"ep": 2}, {"enforce_eager": True, "tensor_parallel_size": 2, "enable_expert_parallel": True}),
        ({"pp": 2}, {**TRACED_ONLY, **DENSE, "pipeline_parallel_size": 2}),
    ],
    ids=["tensor", "expert", "pipeline, dense kernels"],
)
def test_two_ranks(
    tiny: Path,
    prompts: list[list[int]],
    tmp_path: Path,
    offline: Answers,
    tiny_config: dict,
    choice: Choice,
    ranks: dict[str, int],
    engine: dict[str, Any],
) -> None:
    """A shard of every expert, half of the experts, or half of the layers each."""
    answers = generate(tiny, prompts, tmp_path, {"FAKE_DENSE": "1"}, quantization="mxfp4_sm120", **engine)
    assert ("fake_dense: " in (tmp_path / "engine.log").read_text()) == ("additional_config" in engine)
    assert_ours(answers, tiny_config, choice, **ranks)
    assert answers.worst_difference(offline) < TOLERANCE
