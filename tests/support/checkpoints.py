# SPDX-License-Identifier: Apache-2.0
"""A whole GPT-OSS of 40 KB, and ways to change a checkpoint's folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.layers import random_weights
from vllm_mxfp4_sm120.checkpoint import Checkpoint, Sizes, Writer, checked, required_tensors
from vllm_mxfp4_sm120.moe import MoEWeights

CONFIG: dict[str, Any] = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 2,
    "num_local_experts": 3,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 40,
    "quantization_config": {"quant_method": "mxfp4"},
}
SHARD = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"


def write_small(directory: Path, config: Mapping[str, Any] = CONFIG, shard_bytes: int = 1 << 30) -> list[MoEWeights]:
    """Every tensor that `config` asks for; returns each layer's experts, which are random_weights of seed = layer."""
    sizes = Sizes.from_config(config)
    layers = [random_weights(sizes.layer, "cpu", seed) for seed in range(sizes.num_layers)]
    generator = torch.Generator().manual_seed(0)
    with Writer(directory, shard_bytes) as writer:
        for name, info in required_tensors(config).items():
            if ".experts." not in name:
                writer.add(name, torch.randn(info.shape, generator=generator).bfloat16())
        for layer, weights in enumerate(layers):
            writer.add_experts(layer, weights)
        writer.write_json("config.json", config)
    return layers


def change_config(directory: Path, **values: Any) -> None:
    """Replace keys of config.json, or with ... remove them."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """Let `edit` change the tensors of the only shard; the index follows."""
    file = directory / SHARD
    tensors = load_file(file)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, SHARD)}
    (directory / INDEX).write_text(json.dumps(index))
    return file


def change_tensors(directory: Path, tensors: Mapping[str, Tensor | None]) -> Path:
    """Replace or, with None, remove tensors of the only shard."""

    def edit(state: dict[str, Tensor]) -> None:
        state.update({name: tensor for name, tensor in tensors.items() if tensor is not None})
        for name, tensor in tensors.items():
            if tensor is None:
                state.pop(name)

    return edit_tensors(directory, edit)


def rename_tensors(directory: Path, rename: Callable[[str], str]) -> Path:
    """Give the tensors of the only shard other names."""

    def edit(state: dict[str, Tensor]) -> None:
        renamed = {rename(name): tensor for name, tensor in state.items()}
        state.clear()
        state.update(renamed)

    return edit_tensors(directory, edit)


def read_experts(directory: Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """What the folder's reader gives: every layer's experts, the rest being checked from the headers."""
    config = json.loads((directory / "config.json").read_text()) | overrides if overrides else None
    checkpoint = Checkpoint(directory, config)
    return {
        f"{layer}.{name}": tensor
        for layer in range(checkpoint.sizes.num_layers)
        for name, tensor in vars(checkpoint.read_layer(layer)).items()
    }


def load_checked(directory: Path) -> dict[str, Tensor]:
    """What a loader that knows no folder gives: every tensor of every file, checked as it comes."""
    tensors = [item for file in sorted(directory.glob("*.safetensors")) for item in load_file(file).items()]
    config = json.loads((directory / "config.json").read_text())
    return {name: tensor.clone() for name, tensor in checked(tensors, config)}
