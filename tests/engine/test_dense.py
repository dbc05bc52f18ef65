# SPDX-License-Identifier: Apache-2.0
"""Engines with dense kernels or INT8 weights, against transformers with the same weights."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
from vllm import EngineArgs
from vllm.config import set_current_vllm_config

from tests.engine.conftest import Answers, generate, transformers_answers
from vllm_mxfp4_sm120.dense.int8 import Int8Weights
from vllm_mxfp4_sm120.quantization import dense as quantization

TOLERANCE = 2e-2  # of a log-probability, as between BF16 engines and transformers


def dense(kind: str) -> dict:
    return {"mxfp4_sm120": {"dense": kind}}


@pytest.fixture(scope="module")
def rounded(transformers_model, prompts: list[list[int]]) -> Answers:
    """transformers' answers with what `int8` rounds rounded, all else exact."""
    model = copy.deepcopy(transformers_model)
    linear = [getattr(layer.self_attn, f"{name}_proj") for layer in model.model.layers for name in "qkvo"]
    for module in (*linear, model.lm_head, model.model.embed_tokens):
        module.weight.data = Int8Weights.quantize(module.weight.data).decode()
    return transformers_answers(model, prompts)


@pytest.mark.parametrize(
    ("option", "refusal"),
    [
        ({"hf_overrides": {"head_dtype": "float32"}}, "dense int8 has no lm_head of dtype torch.float32"),
        ({"cpu_offload_gb": 1, "cpu_offload_params": {"self_attn"}}, "dense int8 and offloading"),
    ],
    ids=["head_dtype", "offload"],
)
def test_what_int8_excludes_is_refused_before_a_weight_is_read(tiny: Path, option: dict, refusal: str) -> None:
    options = {"quantization": "mxfp4_sm120", "additional_config": dense("int8"), **option}
    with pytest.raises(ValueError, match=refusal):
        EngineArgs(str(tiny), **options).create_engine_config()


# What an engine asks for beside `dense`: the layers that are then ours, and what is said.
LEFT_TO_VLLM: dict[str, tuple[str, dict, str, str | None]] = {
    "nothing": ("bf16", {}, "qkv_proj o_proj lm_head", None),
    "head_dtype": ("bf16", {"hf_overrides": {"head_dtype": "float32"}}, "qkv_proj o_proj", None),
    "offload": ("bf16", {"cpu_offload_gb": 1, "cpu_offload_params": {"self_attn"}}, "", "offloading to the CPU wants"),
    "linear_backend": ("bf16", {"linear_backend": "marlin"}, "", "--linear-backend marlin answers, not dense bf16"),
    **{
        f"{kind}, quantization_config {key}": (
            kind,
            {"quantization_config": {key: value}},
            "lm_head",
            f"--quantization-config answers for qkv_proj and o_proj, not dense {kind}",
        )
        for kind in ("bf16", "int8")
        for key, value in (("linear", "fp8_per_channel"), ("targets", {"re:.*o_proj": "fp8_per_block"}))
    },
}


@pytest.mark.parametrize(("kind", "option", "ours", "said"), LEFT_TO_VLLM.values(), ids=LEFT_TO_VLLM)
def test_layers_that_are_left_to_vllm(
    tiny: Path, kind: str, option: dict, ours: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(quantization, "get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(quantization.logger, "warning_once", lambda line, *values: warnings.append(line % values))
    options = {"quantization": "mxfp4_sm120", "additional_config": dense(kind), **option}
    config = EngineArgs(str(tiny), **options).create_engine_config()
    layers = quantization.Dense()
    layers.prove(config)
    assert set(layers.shapes) == set(ours.split())
    assert len(warnings) == (said is not None) and (said or "") in "".join(warnings)
    with set_current_vllm_config(config):
        taken = {name for name in ("qkv_proj", "o_proj", "router") if layers.method(f"model.layers.0.attn.{name}")}
    assert taken == set(ours.split()) - {"lm_head"}


# The kernels where no GPU is: fake_dense.py.
ENGINES = {
    "bf16": ("bf16", True, {"enforce_eager": True}),
    "int8, compiled": ("int8", True, {}),
    "int8, tensor parallel": ("int8", False, {"enforce_eager": True, "tensor_parallel_size": 2}),
}


@pytest.mark.parametrize(("kind", "kernels", "engine"), ENGINES.values(), ids=ENGINES)
def test_answers_are_those_of_the_weights(
    tiny: Path, prompts, tmp_path: Path, expected: Answers, rounded: Answers, kind: str, kernels: bool, engine: dict
) -> None:
    env = {"FAKE_DENSE": "1"} if kernels else {}
    options = {"quantization": "mxfp4_sm120", "additional_config": dense(kind), **engine}
    answers = generate(tiny, prompts, tmp_path, env, **options)
    assert answers.worst_difference(rounded if kind == "int8" else expected) < TOLERANCE
    log = (tmp_path / "engine.log").read_text()
    assert ("dense layers in INT8" in log) == (kind == "int8")
    if kernels:
        called = re.findall(r"fake_dense: (\d+) tokens of (.*)", log)
        # qkv_proj and lm_head have one shape here, but only one of them has a bias.
        assert len({layer for _, layer in called}) == 3 and {int(tokens) for tokens, _ in called} <= {5, 6, 7, 8}
        assert f"{kind} by {kind}_fake at 5 to 8 tokens (9.0 us there, torch 12.0); else torch's linear" in log
    else:
        assert f"{kind} by torch's linear: it needs an NVIDIA GPU" in log
