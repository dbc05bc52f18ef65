# SPDX-License-Identifier: Apache-2.0
"""The same faults and wishes through vLLM's own loaders: refused in one line, or loaded as the sound checkpoint is.

The real engine up to its model, all rows in one process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.damage import (
    EXPERTS,
    LAYER,
    Damage,
    a_layer_more,
    both,
    config,
    edited,
    renamed,
    tied,
    untouched,
    with_value,
    without,
)
from tests.faults.table import SERVED, Row, one_line, parametrize
from tests.support.checkpoints import CONFIG as SMALL
from tests.support.checkpoints import INDEX, SHARD, change_config, write_small

OURS: dict[str, Any] = {"quantization": "mxfp4_sm120", "max_model_len": 64, "skip_tokenizer_init": True}
# Sizes that vLLM's attention for CPUs takes; in two shards of which each expert is in one.
CONFIG: dict[str, Any] = {
    **SMALL,
    "architectures": ["GptOssForCausalLM"],
    "head_dim": 32,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 2048,
}


def as_bin(damage: Damage) -> Damage:
    """The damaged tensors in a file whose header nobody can read: what is wrong is found as it loads."""

    def change(directory: Path) -> None:
        damage(directory)
        torch.save(load_file(directory / SHARD), directory / "pytorch_model.bin")
        (directory / SHARD).unlink()
        (directory / INDEX).unlink(missing_ok=True)

    return change


def as_repository(damage: Damage) -> Damage:
    """The damaged folder as Hugging Face's cache holds a repository, which has the folder's name."""

    def change(directory: Path) -> None:
        damage(directory)
        repository = directory.parent / f"models--faults--{directory.name}"
        snapshot = repository / "snapshots" / ("0" * 40)
        for folder in (repository / "blobs", repository / "refs", snapshot):
            folder.mkdir(parents=True)
        (repository / "refs" / "main").write_text(snapshot.name)
        for number, file in enumerate(sorted(directory.iterdir())):
            blob = Path(shutil.move(file, repository / "blobs" / f"{number}"))
            (snapshot / file.name).symlink_to(Path("../../blobs", blob.name))

    return change


def in_two_bins(directory: Path) -> None:
    """One tensor in both."""
    state = load_file(directory / SHARD)
    as_bin(untouched)(directory)
    torch.save({"lm_head.weight": state["lm_head.weight"]}, directory / "pytorch_model-2.bin")


def no_weights(directory: Path) -> None:
    """A clone without Git LFS."""
    (directory / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def wants(**arguments: Any) -> dict[str, Any]:
    return {**OURS, **arguments}


REPOSITORY = wants(model="a repository")


MISSING = (
    f"{EXPERTS}.down_proj_scales",
    f"{EXPERTS}.gate_up_proj_bias",
    f"{LAYER}.self_attn.q_proj.weight",
    f"{LAYER}.self_attn.k_proj.bias",
    f"{LAYER}.self_attn.sinks",
    f"{LAYER}.input_layernorm.weight",
    f"{LAYER}.mlp.router.bias",
    "model.norm.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
)
AS_IT_LOADS = [
    Row("bin, sound", as_bin(untouched), SERVED, engine=OURS),
    *(Row(f"bin without {name}", as_bin(without(name)), f"{name} (", engine=OURS) for name in MISSING),
    Row(
        "bin, scales of a part of the rows",
        as_bin(edited(f"{EXPERTS}.down_proj_scales", lambda scales: scales[:, :50])),
        f"{EXPERTS}.down_proj_scales is U8 [3, 50, 2], expected U8 [3, 96, 2]",
        engine=OURS,
    ),
    Row(
        "bin, an expert too few",
        as_bin(edited(f"{EXPERTS}.down_proj_blocks", lambda blocks: blocks[:2])),
        f"{EXPERTS}.down_proj_blocks is U8 [2, 96, 2, 16], expected U8 [3, 96, 2, 16]",
        engine=OURS,
    ),
    Row(
        "bin, a scale of 255",
        as_bin(with_value(f"{EXPERTS}.down_proj_scales", 255)),
        f"{EXPERTS}.down_proj_scales[1, 48, 0] is 255 (NaN)",
        engine=OURS,
    ),
    *(
        Row(
            f"bin, NaN in {name}",
            as_bin(with_value(name, float("nan"))),
            f"NaN or Inf (or beyond BF16's range) in {name}",
            engine=OURS,
        )
        for name in (f"{EXPERTS}.down_proj_bias", f"{LAYER}.mlp.router.weight", f"{LAYER}.self_attn.sinks")
    ),
    Row(
        "bin, router as a fine-tuning tool spells it",
        as_bin(renamed(("mlp.router.", "mlp.router.linear."))),
        SERVED,
        engine=OURS,
    ),
    Row(
        "bin, blocks in three dimensions",
        as_bin(edited(f"{EXPERTS}.down_proj_blocks", lambda blocks: blocks.flatten(2))),
        SERVED,
        engine=OURS,
    ),
    Row(
        "bin, biases in float32",
        as_bin(edited(f"{EXPERTS}.down_proj_bias", lambda bias: bias.float())),
        SERVED,
        engine=OURS,
    ),
    Row(
        "bin, tied embeddings from memory that is used again",
        as_bin(both(tied, config(tie_word_embeddings=True))),
        "as the embedding",
        engine=wants(load_format="reuses_memory"),
    ),
    Row("bin, a tensor in two files", in_two_bins, "lm_head.weight comes twice", engine=OURS),
    Row("bin, a layer more", as_bin(a_layer_more(2)), "layers.2.", engine=OURS),
    Row("bin, an adapter", as_bin(renamed((".q_proj.", ".q_proj.base_layer."))), "merge the adapter", engine=OURS),
]
REPOSITORIES = [
    Row("repository, sound", as_repository(untouched), SERVED, engine=REPOSITORY),
    Row("repository of .bin, sound", as_repository(as_bin(untouched)), SERVED, engine=REPOSITORY),
    *(
        Row(f"repository without {name}", as_repository(without(name)), f"{name} (", engine=REPOSITORY)
        for name in (f"{EXPERTS}.down_proj_scales", f"{LAYER}.self_attn.q_proj.weight", "lm_head.weight")
    ),
    Row(
        "repository, scales of a part of the rows",
        as_repository(edited(f"{EXPERTS}.down_proj_scales", lambda scales: scales[:, :50])),
        f"{EXPERTS}.down_proj_scales is U8 [3, 50, 2], expected U8 [3, 96, 2]",
        engine=REPOSITORY,
    ),
    Row(
        "repository of .bin without a router",
        as_repository(as_bin(without(f"{LAYER}.mlp.router.weight"))),
        f"{LAYER}.mlp.router.weight (",
        engine=REPOSITORY,
    ),
    Row("repository, swiglu_limit", as_repository(config(swiglu_limit=0.5)), "swiglu_limit is 0.5", engine=REPOSITORY),
]
FORMATS = [
    Row("memory that is used again", untouched, SERVED, engine=wants(load_format="reuses_memory")),
    Row("tensorizer", untouched, "load the published checkpoint", engine=wants(load_format="tensorizer")),
    Row("modelexpress", untouched, "load the published checkpoint", engine=wants(load_format="modelexpress")),
    Row("ipc_cache", untouched, "load the published checkpoint", engine=wants(load_format="ipc_cache")),
    Row("safetensors, sound", untouched, SERVED, engine=OURS),
    Row("a hyphen", untouched, SERVED, engine=wants(quantization="mxfp4-sm120")),
    Row("capitals", untouched, SERVED, engine=wants(quantization="MXFP4_SM120")),
    Row("a misspelling", untouched, "did you mean mxfp4_sm120?", engine=wants(quantization="mxfp4_sm12")),
    Row(
        "several threads", untouched, SERVED, engine=wants(model_loader_extra_config={"enable_multithread_load": True})
    ),
    Row("weights tracked", untouched, SERVED, engine=wants(model_loader_extra_config={"enable_weights_track": True})),
    Row("pointers of Git LFS", no_weights, SHARD, engine=OURS),
    Row("sharded_state", untouched, "load the published checkpoint", engine=wants(load_format="sharded_state")),
    Row(
        "a layer more than there is",
        untouched,
        "holds 2 layers, but num_hidden_layers is 3",
        engine=wants(
            hf_overrides={
                "num_hidden_layers": 3,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            }
        ),
    ),
    Row(
        "a layer less than there is",
        untouched,
        "holds 2 layers, but num_hidden_layers is 1",
        engine=wants(hf_overrides={"num_hidden_layers": 1}),
    ),
    Row(
        "quantization_config by --hf-overrides",
        config(quantization_config=...),
        SERVED,
        engine=wants(hf_overrides={"quantization_config": {"quant_method": "mxfp4"}}),
    ),
    Row("swiglu_limit", config(swiglu_limit=0.5), "swiglu_limit is 0.5, expected 7", engine=OURS),
    Row("more experts a token than there are", config(num_experts_per_tok=4), "num_experts_per_tok", engine=OURS),
]
OVERRIDES = [
    Row(f"override {key} {value}", untouched, said, engine=wants(hf_overrides={key: value}))
    for key, value, said in (
        ("num_experts_per_tok", 3, SERVED),
        ("num_experts_per_tok", 0, "num_experts_per_tok is 0, expected a positive integer"),
        ("num_local_experts", 2, "U8 [3, 128, 3, 16], expected U8 [2, 128, 3, 16]"),
        ("intermediate_size", 32, "U8 [3, 128, 3, 16], expected U8 [3, 64, 3, 16]"),
        ("vocab_size", 41, "BF16 [40, 96], expected BF16 [41, 96]"),
        ("num_key_value_heads", 4, "BF16 [64, 96], expected BF16 [128, 96]"),
        ("rms_norm_eps", 1e-6, "rms_norm_eps is 1e-06, expected 1e-05"),
        ("swiglu_limit", 1.0, "swiglu_limit is 1.0, expected 7"),
        ("sliding_window", 64, SERVED),
        ("quantization_config", {"quant_method": "mxfp4", "group_size": 16}, "group_size is 16, expected 32"),
        ("tie_word_embeddings", True, SERVED),
        ("architectures", ["LlamaForCausalLM"], "no module or parameter named"),
    )
]
WISHES = [
    Row("LoRA", untouched, "--lora-target-modules qkv_proj o_proj", engine=wants(enable_lora=True)),
    Row(
        "LoRA on experts",
        untouched,
        "--lora-target-modules qkv_proj o_proj",
        engine=wants(enable_lora=True, lora_target_modules=["experts", "o_proj"]),
    ),
    Row(
        "LoRA without experts",
        untouched,
        SERVED,
        engine=wants(enable_lora=True, lora_target_modules=["qkv_proj", "o_proj"]),
    ),
    Row("dense kernels", untouched, SERVED, engine=wants(additional_config={"mxfp4_sm120": {"dense": "bf16"}})),
    Row("offloading", untouched, "--cpu-offload-params self_attn", engine=wants(cpu_offload_gb=1)),
    Row(
        "offloading of experts",
        untouched,
        "--cpu-offload-params self_attn",
        engine=wants(cpu_offload_gb=1, cpu_offload_params={"experts"}),
    ),
    Row("prefetched layers", untouched, "--cpu-offload-params self_attn", engine=wants(offload_group_size=2)),
    Row("Marlin", untouched, "--moe-backend marlin is vLLM's own", engine=wants(moe_backend="marlin")),
    Row("float16", untouched, "only --dtype bfloat16 is served", engine=wants(dtype="float16")),
    Row("pooling", untouched, "a pooling model", engine=wants(runner="pooling", convert="embed")),
    Row(
        "MXFP8 activations",
        untouched,
        "--quantization-config moe",
        engine=wants(quantization_config={"moe": {"activation": "mxfp8"}}),
    ),
]
ROWS = AS_IT_LOADS + REPOSITORIES + FORMATS + OVERRIDES + WISHES


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What became of each row, by name."""
    home = tmp_path_factory.mktemp("engine")
    write_small(home / "sound", CONFIG)
    change_config(home / "sound", **CONFIG)
    tasks = []
    for number, row in enumerate(ROWS):
        folder = Path(shutil.copytree(home / "sound", home / f"row{number}"))
        row.damage(folder)
        tasks.append((str(folder), {**(row.engine or {})}))
        if "model" in tasks[-1][1]:
            tasks[-1][1]["model"] = f"faults/{folder.name}"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(home)}
    env |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.engine", str(home / "results.json")],
        cwd=Path(__file__).parents[2],
        env=env,
        input=json.dumps(tasks, default=list),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(zip((row.name for row in ROWS), json.loads((home / "results.json").read_text()), strict=True))


@parametrize(ROWS)
def test_an_engine(row: Row, results: dict[str, list[Any]]) -> None:
    error, parameters = results[row.name]
    if row.expected == SERVED:
        assert error is None, error
        sound = results["safetensors, sound"][1]
        assert {name.replace(".base_layer", ""): value for name, value in parameters.items()} == sound
    elif row.expected == "as the embedding":
        assert error is None, error
        assert parameters["lm_head.weight"] == parameters["model.embedding.weight"]
    else:
        assert error is not None and row.expected in error, error
        assert one_line(ValueError(error))
