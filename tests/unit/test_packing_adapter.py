# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters merged while packing: against PEFT where it is installed, and against the sums written out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.checkpoints import CONFIG, write_small
from tests.unit.test_packing import assert_same, tensors_of
from vllm_mxfp4_sm120 import packing
from vllm_mxfp4_sm120.packing import Options

pytestmark = pytest.mark.usefixtures("one_thread")
RANK, ALPHA = 2, 6
PREFIX = "base_model.model.model.layers"
SETTINGS = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packed") / "model"
    write_small(directory)
    (directory / "tokenizer.json").write_text("the base's")
    return directory


@pytest.fixture(scope="module")
def bf16(packed: Path) -> Path:
    directory = packed.with_name("bf16")
    packing.unpack(packed, directory)
    return directory


def adapter(directory: Path, tensors: dict[str, Tensor], **settings: Any) -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def factors(rows: int, k: int, experts: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(experts * RANK, k, generator=generator) * 0.1, torch.randn(
        rows, experts * RANK, generator=generator
    ) * 0.1


def pair(module: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {f"{PREFIX}.{module}.lora_A.weight": a, f"{PREFIX}.{module}.lora_B.weight": b}


@pytest.mark.parametrize("rslora", [False, True])
def test_attention_is_merged_and_packed_experts_stay(packed: Path, tmp_path: Path, rslora: bool) -> None:
    a, b = factors(32, 96)
    whole = torch.full((3, 96), 0.5)
    tensors = pair("0.self_attn.q_proj", a, b) | {f"{PREFIX}.0.mlp.router.modules_to_save.weight": whole}
    lora = adapter(tmp_path / "lora", tensors, use_rslora=rslora)
    (lora / "tokenizer.json").write_text("the adapter's")
    packing.pack(packed, tmp_path / "merged", Options(adapter=lora))
    before, after = tensors_of(packed), tensors_of(tmp_path / "merged")
    name = "model.layers.0.self_attn.q_proj.weight"
    scaling = ALPHA / (math.sqrt(RANK) if rslora else RANK)
    expected = (before[name].float() + scaling * (b @ a)).bfloat16()
    assert_same(after, before | {name: expected, "model.layers.0.mlp.router.weight": whole.bfloat16()})
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "the adapter's"


def test_experts_one_by_one(bf16: Path, tmp_path: Path) -> None:
    """As Unsloth has them: a linear layer for each expert; gate alone, too."""
    a, b = factors(128, 96)
    gate_a, gate_b = factors(64, 96, seed=1)
    tensors = pair("1.mlp.experts.gate_up_projs.2", a, b) | pair("0.mlp.experts.1.gate_proj", gate_a, gate_b)
    packing.pack(bf16, tmp_path / "merged", Options(adapter=adapter(tmp_path / "lora", tensors)))
    by_hand = tensors_of(bf16)
    weights = {name: by_hand[f"model.layers.{name}.mlp.experts.gate_up_proj"].float() for name in "01"}
    weights["1"][2] += 3 * (b @ a).T
    weights["0"][1, :, ::2] += 3 * (gate_b @ gate_a).T
    assert_packed_as(bf16, {f"model.layers.{n}.mlp.experts.gate_up_proj": w for n, w in weights.items()}, tmp_path)


def assert_packed_as(bf16: Path, changed: dict[str, Tensor], tmp_path: Path) -> None:
    """What was packed to `merged` is what the source with these tensors packs to."""
    by_hand = tmp_path / "by hand"
    by_hand.mkdir()
    (by_hand / "config.json").write_text((bf16 / "config.json").read_text())
    save_file(tensors_of(bf16) | changed, by_hand / "model.safetensors")
    packing.pack(by_hand, tmp_path / "expected")
    merged, expected = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "expected")
    touched = {f"{name}_{kind}" for name in changed for kind in ("blocks", "scales")}
    for name in touched:
        assert torch.equal(merged[name], expected[name]), name
    assert not torch.equal(merged[next(iter(touched))], tensors_of(bf16.with_name("model"))[next(iter(touched))])


def test_all_experts_at_once_as_peft_merges_them(bf16: Path, packed: Path, tmp_path: Path) -> None:
    """target_parameters of both projections, which PEFT nests into each other, and attention beside them."""
    peft = pytest.importorskip("peft")
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(**{key: value for key, value in CONFIG.items() if key != "quantization_config"})
    model = GptOssForCausalLM(config)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors_of(bf16).items()})
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj"], target_parameters=targets)
    tuned = peft.get_peft_model(model, lora)
    for name, parameter in tuned.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    tuned.save_pretrained(tmp_path / "lora")
    merged = tuned.merge_and_unload().state_dict()
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "config.json").write_text((bf16 / "config.json").read_text())
    save_file({name: tensor.contiguous() for name, tensor in merged.items()}, tmp_path / "peft" / "model.safetensors")
    packing.pack(tmp_path / "peft", tmp_path / "expected")
    for base in (bf16, packed):
        packing.pack(base, tmp_path / f"merged-{base.name}", Options(adapter=tmp_path / "lora"))
        found, expected = tensors_of(tmp_path / f"merged-{base.name}"), tensors_of(tmp_path / "expected")
        assert found.keys() == expected.keys()
        for name in found:  # sums in another order may fall to the other side of a midpoint
            same = (found[name] == expected[name]).double().mean()
            assert same > 0.999, name


BAD: dict[str, tuple[dict[str, Tensor] | None, dict[str, Any], str]] = {
    "no tensors": ({}, {}, "holds no tensors, expected a LoRA's"),
    "dora": (None, {"use_dora": True}, "use_dora is True, expected False; merge it with PEFT"),
    "ranks": (None, {"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
    "kind": (None, {"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
    "half": ({f"{PREFIX}.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 96)}, {}, "q_proj.weight without its other"),
    "unknown": (pair("0.mlp.shared", *factors(1, 1)), {}, "can't merge .*shared"),
    "layers": (pair("9.self_attn.q_proj", *factors(32, 96)), {}, r"can't merge .*layers\.9"),
    "sizes": (pair("0.self_attn.q_proj", *factors(32, 64)), {}, r"don't make \[32, 96\]"),
    "an expert beyond": (pair("0.mlp.experts.gate_up_projs.3", *factors(128, 96)), {}, r"can't merge .*projs\.3"),
    "ranks that experts don't share": (pair("0.mlp.experts", *factors(128, 96)), {}, r"don't make \[128, 96\]"),
    "a number for experts": (pair("0.mlp.experts", torch.ones(()), torch.ones(())), {}, "can't merge"),
    "embedding": ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(2, 40)}, {}, "can't merge"),
}


@pytest.mark.parametrize("fault", BAD)
def test_an_adapter_that_cannot_be_merged_is_refused(fault: str, packed: Path, tmp_path: Path) -> None:
    tensors, settings, message = BAD[fault]
    tensors = pair("0.self_attn.q_proj", *factors(32, 96)) if tensors is None else tensors
    lora = adapter(tmp_path / "lora", tensors, **settings)
    with pytest.raises(ValueError, match=message):
        packing.pack(packed, tmp_path / "merged", Options(adapter=lora))
    assert not list(tmp_path.glob("merged*"))
