# SPDX-License-Identifier: Apache-2.0
"""Engines whose dense layers are INT8, against transformers with the same layers' weights rounded to INT8."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from vllm import EngineArgs

from tests.engine.conftest import Answers, generate, transformers_answers
from vllm_mxfp4_sm120.dense.int8 import Int8Weights

INT8 = {"mxfp4_sm120": {"dense": "int8"}}
TOLERANCE = 2e-2  # of a log-probability, as between BF16 engines and transformers


@pytest.fixture(scope="module")
def rounded(transformers_model, prompts: list[list[int]]) -> Answers:
    """transformers' answers with what `int8` rounds rounded, all else exact."""
    model = copy.deepcopy(transformers_model)
    linear = [getattr(layer.self_attn, f"{name}_proj") for layer in model.model.layers for name in "qkvo"]
    for module in (*linear, model.lm_head, model.model.embed_tokens):
        module.weight.data = Int8Weights.quantize(module.weight.data).decode()
    return transformers_answers(model, prompts)


ENGINES = {
    "compiled": {},
    "tensor": {"enforce_eager": True, "tensor_parallel_size": 2},
}


@pytest.mark.parametrize(
    ("option", "refusal"),
    [
        ({"hf_overrides": {"head_dtype": "float32"}}, "dense int8 has no lm_head of dtype torch.float32"),
        ({"cpu_offload_gb": 1, "cpu_offload_params": {"self_attn"}}, "dense int8 and offloading"),
    ],
    ids=["head_dtype", "offload"],
)
def test_what_int8_excludes_is_refused_before_a_weight_is_read(tiny: Path, option: dict, refusal: str) -> None:
    with pytest.raises(ValueError, match=refusal):
        EngineArgs(str(tiny), quantization="mxfp4_sm120", additional_config=INT8, **option).create_engine_config()


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_answers_are_those_of_the_rounded_weights(
    tiny: Path, prompts: list[list[int]], tmp_path: Path, rounded: Answers, engine: dict
) -> None:
    answers = generate(tiny, prompts, tmp_path, quantization="mxfp4_sm120", additional_config=INT8, **engine)
    assert answers.worst_difference(rounded) < TOLERANCE
    log = (tmp_path / "engine.log").read_text()
    assert "dense layers in INT8" in log
