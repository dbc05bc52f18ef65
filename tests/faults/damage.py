# SPDX-License-Identifier: Apache-2.0
"""Ways to damage a checkpoint's folder: each returns a function of that folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.checkpoints import INDEX, change_config, change_tensors, edit_tensors, rename_tensors

Damage = Callable[[Path], object]
LAYER = "model.layers.1"
EXPERTS = f"{LAYER}.mlp.experts"


def untouched(directory: Path) -> None:
    pass


def config(**values: object) -> Damage:
    return lambda directory: change_config(directory, **values)


def without(*names: str) -> Damage:
    return lambda directory: change_tensors(directory, dict.fromkeys(names))


def edited(name: str, edit: Callable[[Tensor], Tensor]) -> Damage:
    """One tensor replaced by what `edit` makes of it."""
    return lambda directory: edit_tensors(directory, lambda state: state.update({name: edit(state[name])}))


def edited_all(part: str, edit: Callable[[Tensor], Tensor]) -> Damage:
    """Every tensor whose name holds `part`."""
    return lambda directory: edit_tensors(
        directory, lambda state: state.update({name: edit(value) for name, value in state.items() if part in name})
    )


def with_value(name: str, value: float) -> Damage:
    """One number in the middle of a tensor."""

    def edit(tensor: Tensor) -> Tensor:
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return edited(name, edit)


def renamed(*pairs: tuple[str, str]) -> Damage:
    def rename(name: str) -> str:
        for old, new in pairs:
            name = name.replace(old, new)
        return name

    return lambda directory: rename_tensors(directory, rename)


def added(name: str, *shape: int) -> Damage:
    return lambda directory: change_tensors(directory, {name: torch.zeros(shape or (2, 2))})


def file_of(name: str, content: bytes | str) -> Damage:
    return lambda directory: (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)


def index_of(**entries: object) -> Damage:
    """Entries of the index's weight_map replaced; dots in names are written as __."""

    def damage(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        index["weight_map"].update({name.replace("__", "."): value for name, value in entries.items()})
        (directory / INDEX).write_text(json.dumps(index))

    return damage


def in_place_of(name: str, make: Callable[[Path], object]) -> Damage:
    def damage(directory: Path) -> None:
        (directory / name).unlink()
        make(directory / name)

    return damage


def both(*damages: Damage) -> Damage:
    return lambda directory: [damage(directory) for damage in damages]


def second_shard(directory: Path) -> None:
    """Another file that holds one of the tensors, both named by the index."""
    save_file({"model.norm.weight": torch.zeros(96).bfloat16()}, directory / "other.safetensors")
    index_of(extra="other.safetensors")(directory)
    save_file(
        {"model.norm.weight": torch.zeros(96).bfloat16(), "extra": torch.zeros(1)}, directory / "other.safetensors"
    )


def original_names(directory: Path) -> None:
    """As openai/gpt-oss names them, q, k and v in one tensor."""

    def edit(state: dict[str, Tensor]) -> None:
        for layer in range(2):
            for kind in ("weight", "bias"):
                parts = [state.pop(f"model.layers.{layer}.self_attn.{p}_proj.{kind}") for p in "qkv"]
                state[f"block.{layer}.attn.qkv.{kind}"] = torch.cat(parts)

    edit_tensors(directory, edit)
    renamed(
        ("model.layers.", "block."),
        ("input_layernorm.weight", "attn.norm.scale"),
        ("post_attention_layernorm.weight", "mlp.norm.scale"),
        ("self_attn.o_proj", "attn.out"),
        ("self_attn.", "attn."),
        ("mlp.router", "mlp.gate"),
        ("mlp.experts.gate_up_proj_bias", "mlp.mlp1_bias"),
        ("mlp.experts.down_proj_bias", "mlp.mlp2_bias"),
        ("mlp.experts.gate_up_proj_", "mlp.mlp1_weight."),
        ("mlp.experts.down_proj_", "mlp.mlp2_weight."),
        ("model.embed_tokens.", "embedding."),
        ("model.norm.weight", "norm.scale"),
        ("lm_head.", "unembedding."),
    )(directory)


def a_layer_more(number: int) -> Damage:
    """Another copy of the last layer."""

    def edit(state: dict[str, Tensor]) -> None:
        for name, tensor in list(state.items()):
            if LAYER in name:
                state[name.replace(LAYER, f"model.layers.{number}")] = tensor.clone()

    return lambda directory: edit_tensors(directory, edit)


def tied(directory: Path) -> None:
    """lm_head is the embedding, and only that is there."""
    change_config(directory, tie_word_embeddings=True)
    change_tensors(directory, {"lm_head.weight": None})


def per_expert(directory: Path) -> None:
    def edit(state: dict[str, Tensor]) -> None:
        for kind in ("blocks", "scales", "bias"):
            for expert, tensor in enumerate(state.pop(f"{EXPERTS}.down_proj_{kind}")):
                state[f"{EXPERTS}.{expert}.down_proj_{kind}"] = tensor.clone()

    edit_tensors(directory, edit)


def unpacked(directory: Path) -> None:
    """BF16 experts, as transformers saves them after dequantizing."""

    def edit(state: dict[str, Tensor]) -> None:
        for layer in range(2):
            prefix = f"model.layers.{layer}.mlp.experts"
            for name, k, rows in (("gate_up_proj", 96, 128), ("down_proj", 64, 96)):
                del state[f"{prefix}.{name}_blocks"], state[f"{prefix}.{name}_scales"]
                state[f"{prefix}.{name}"] = torch.zeros(3, k, rows).bfloat16()

    edit_tensors(directory, edit)
    change_config(directory, quantization_config=...)
