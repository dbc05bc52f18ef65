# SPDX-License-Identifier: Apache-2.0
"""Which models are this plugin's on SM 12.x without being asked for, and what it says of an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_mxfp4_sm120 import NAME, plugin


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Warnings of the claim. Not by a handler: vLLM sets up logging anew as it makes its first configuration."""
    from vllm_mxfp4_sm120.quantization import model_config

    lines: list[str] = []
    monkeypatch.setattr(model_config.logger, "warning", lambda line, *values: lines.append(line % values))
    return lines


@pytest.fixture
def sm120(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the claim can see."""
    from vllm_mxfp4_sm120.quantization import config

    plugin.register()

    class Platform:
        @staticmethod
        def is_device_capability_family(family: int) -> bool:
            return family == 120

    monkeypatch.setattr(config, "current_platform", Platform)


def quantization(model: Path, **arguments: Any) -> str:
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(model=str(model), **arguments).create_engine_config().model_config
    ours = config.hf_config.architectures == ["Mxfp4Sm120ForCausalLM"]
    assert ours == (config.quantization == NAME)
    return str(config.quantization)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"enable_lora": True}, "--enable-lora would reach the experts"),
        ({"load_format": "sharded_state"}, "holds experts in one backend's own layout"),
        ({"cpu_offload_gb": 1}, "the experts can't be offloaded to the CPU"),
        ({"moe_backend": "marlin"}, "--moe-backend marlin is vLLM's own"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_claim_steps_aside(
    arguments: dict[str, Any], reason: str, tiny: Path, sm120: None, said: list[str]
) -> None:
    assert quantization(tiny, **arguments) == "gpt_oss_mxfp4"
    assert len(said) == 1 and said[0].startswith(f"mxfp4_sm120 leaves {tiny} to vLLM's own experts: ")
    assert reason in said[0]


@pytest.mark.parametrize(
    "arguments", [{}, {"enable_lora": True, "lora_target_modules": ["qkv_proj", "o_proj"]}], ids=["plain", "LoRA"]
)
def test_the_claim(arguments: dict[str, Any], tiny: Path, sm120: None, said: list[str]) -> None:
    assert quantization(tiny, **arguments) == "mxfp4_sm120"
    assert said == []


def test_a_bad_variable_stops_our_models_only(
    tiny: Path, sm120: None, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MXFP4_SM120_TYPO", "1")
    assert quantization(tiny, quantization="gpt_oss_mxfp4") == "gpt_oss_mxfp4"
    with pytest.raises(ValueError, match="MXFP4_SM120_TYPO is not a variable of this plugin"):
        quantization(tiny)


def test_an_adapter_with_experts() -> None:
    """vLLM asks the model for a table of names, and drops what it has no LoRA layer for."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    from vllm_mxfp4_sm120.quantization.model import Mxfp4Sm120ForCausalLM

    names = Mxfp4Sm120ForCausalLM.hf_to_vllm_mapper.get_rename_mapper()
    prefix = "base_model.model.model.layers.0"
    assert parse_fine_tuned_lora_name(f"{prefix}.self_attn.q_proj.lora_A.weight", names) == (
        "model.layers.0.attn.q_proj",
        True,
    )
    with pytest.raises(ValueError, match="packed experts take no adapter"):
        parse_fine_tuned_lora_name(f"{prefix}.mlp.experts.lora_A.weight", names)
