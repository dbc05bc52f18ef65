# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written and read back, headers alone, limits of the environment. What is refused: tests/faults."""

import json
import math
import os
import resource
import shutil
import stat
import struct

import pytest
import torch
from safetensors.torch import load_file

from tests.support.checkpoints import (
    CONFIG,
    SHARD,
    change_config,
    change_tensors,
    load_checked,
    rename_tensors,
    write_small,
)
from tests.support.layers import random_weights
from vllm_mxfp4_sm120 import checkpoint
from vllm_mxfp4_sm120.checkpoint import Checkpoint, FiniteCheck, Packing, Sizes, Writer, required_tensors
from vllm_mxfp4_sm120.checkpoint import config as config_module

SIZES = Sizes.from_config(CONFIG)
SCALES = "model.layers.1.mlp.experts.down_proj_scales"


@pytest.fixture(autouse=True)
def fresh_environment(monkeypatch):
    monkeypatch.delenv("MXFP4_SM120_GROUP_SIZE", raising=False)
    monkeypatch.delenv("MXFP4_SM120_PACK_LAYOUT", raising=False)
    config_module._overrides.cache_clear()
    yield
    config_module._overrides.cache_clear()


@pytest.fixture
def directory(tmp_path):
    write_small(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000, 1])
def test_what_is_written_is_read_back(tmp_path, shard_bytes):
    layers = write_small(tmp_path / "model", shard_bytes=shard_bytes)
    opened = Checkpoint(tmp_path / "model")
    assert opened.sizes == SIZES
    assert opened.packing == Packing(32, "low_nibble_first")
    assert opened.renamed == {}
    for layer, weights in enumerate(layers):
        for name, tensor in vars(opened.read_layer(layer)).items():
            assert torch.equal(tensor, getattr(weights, name)), name


def test_the_layout_is_the_published_one(directory):
    weights = random_weights(SIZES.layer, "cpu", 0)
    state = load_file(directory / SHARD)
    prefix = "model.layers.0.mlp.experts."
    assert {
        name.removeprefix(prefix): list(tensor.shape) for name, tensor in state.items() if name.startswith(prefix)
    } == {
        "gate_up_proj_blocks": [3, 128, 3, 16],
        "gate_up_proj_scales": [3, 128, 3],
        "gate_up_proj_bias": [3, 128],
        "down_proj_blocks": [3, 96, 2, 16],
        "down_proj_scales": [3, 96, 2],
        "down_proj_bias": [3, 96],
    }
    assert torch.equal(state[f"{prefix}gate_up_proj_blocks"].flatten(-2), weights.w13)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(state, SHARD)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())


def test_required_tensors_are_those_of_transformers():
    """Names and shapes of transformers' own state dict, experts aside, which it holds unpacked."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = {key: value for key, value in CONFIG.items() if key != "quantization_config"}
    with torch.device("meta"):
        state = GptOssForCausalLM(GptOssConfig(**config)).state_dict()
    for tied in (False, True):
        required = required_tensors(CONFIG | {"tie_word_embeddings": tied})
        dense = {name: info.shape for name, info in required.items() if ".experts." not in name}
        theirs = {name: tuple(tensor.shape) for name, tensor in state.items() if ".experts." not in name}
        assert dense == {name: shape for name, shape in theirs.items() if not (tied and name == "lm_head.weight")}
        for name, tensor in state.items():
            if name.endswith("_bias") and ".experts." in name:
                assert required[name].shape == tuple(tensor.shape)


def test_shards_hold_no_more_than_they_may(tmp_path):
    write_small(tmp_path / "model", shard_bytes=20_000)
    shards = list((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 20_000


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_get_the_modes_that_the_umask_gives(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_small(tmp_path / "model")
    finally:
        os.umask(before)
    for path in (tmp_path / "model").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o777 & ~umask


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="disk"), Writer(tmp_path / "model", 1) as writer:
        for layer in range(2):
            writer.add_experts(layer, random_weights(SIZES.layer, "cpu"))
        assert not (tmp_path / "model").exists()
        raise RuntimeError("disk on fire")
    assert list(tmp_path.iterdir()) == []


def test_nothing_that_exists_is_overwritten(directory):
    with pytest.raises(ValueError) as error:
        Writer(directory).__enter__()
    assert str(error.value) == (
        f"{directory}: already exists, expected a new name or an empty directory; remove it first"
    )
    assert [path.name for path in directory.parent.iterdir()] == ["model"]
    Checkpoint(directory)


def test_a_tensor_added_twice_is_refused(tmp_path):
    with pytest.raises(ValueError) as error, Writer(tmp_path / "model", 1) as writer:
        for _ in range(2):
            writer.add("x", torch.zeros(3))
    assert str(error.value) == f"{tmp_path / 'model'}: tensor x was added twice, expected once"
    assert list(tmp_path.iterdir()) == []


def test_a_full_size_checkpoint_is_checked_from_its_headers_alone(tmp_path):
    """gpt-oss-20b's tensors, 14 GB, in files that are one hole behind their headers."""
    config = checkpoint.published_config("openai/gpt-oss-20b")
    (tmp_path / "config.json").write_text(json.dumps(config))
    required = list(required_tensors(config).items())
    for shard in range(24):
        header, end = {}, 0
        for name, info in required[shard::24]:
            start, end = end, end + math.prod(info.shape) * (2 if info.dtype == "BF16" else 1)
            header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (tmp_path / f"{shard}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    opened = Checkpoint(tmp_path)
    assert len(opened.tensors) == len(required) == 3 + 24 * 19
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB: pages read would count


def test_scale_code_255(directory):
    scales = torch.full((3, 96, 2), 120, dtype=torch.uint8)
    scales[1, 90, 1] = scales[2, 0, 0] = 255
    change_tensors(directory, {SCALES: scales})
    opened = Checkpoint(directory)
    opened.read_layer(0)
    with pytest.raises(ValueError) as error:
        opened.read_layer(1)
    assert str(error.value) == (
        f"{SCALES}[1, 90, 1] is 255 (NaN), expected 0 to 254; the checkpoint is damaged, fetch it again"
    )


def test_scales_up_to_254_pass(directory):
    change_tensors(directory, {SCALES: torch.arange(576).remainder(255).byte().view(3, 96, 2)})
    assert Checkpoint(directory).read_layer(1).w2_scale.max() == 254


def test_finite_check_names_all_that_is_not_finite():
    check = FiniteCheck()
    check.add("fine", torch.full((3,), 3e38))
    check.add("nan", torch.tensor([0.0, math.nan]).bfloat16())
    check.add("inf", torch.tensor([[0.0], [-math.inf]]).half())
    check.add("bytes", torch.tensor([255], dtype=torch.uint8))
    check.add("empty", torch.empty(0))
    with pytest.raises(ValueError, match=r"^NaN or Inf \(or beyond BF16's range\) in nan, inf, expected"):
        check.finish()
    check.finish()  # and begins anew


def test_the_environment_goes_before_the_file_and_is_read_once(directory, monkeypatch):
    change_config(directory, quantization_config={"quant_method": "mxfp4", "group_size": 16, "pack_layout": "planar"})
    monkeypatch.setenv("MXFP4_SM120_GROUP_SIZE", "32")
    monkeypatch.setenv("MXFP4_SM120_PACK_LAYOUT", "low_nibble_first")
    assert Checkpoint(directory).packing == Packing()
    monkeypatch.delenv("MXFP4_SM120_GROUP_SIZE")
    assert Checkpoint(directory).packing == Packing()


def test_an_unreadable_file(directory, monkeypatch):
    """Permissions don't stop the superuser that tests may run as, so the refusal is simulated."""

    def denied(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    with pytest.raises(ValueError) as error:
        Checkpoint(directory)
    assert str(error.value) == f"{directory}/config.json: permission denied, expected a readable checkpoint"


def test_without_an_index_every_shard_is_read(directory):
    (directory / "model.safetensors.index.json").unlink()
    shutil.move(directory / SHARD, directory / "model.safetensors")
    assert len(Checkpoint(directory).tensors) == len(required_tensors(CONFIG))


def test_other_names_and_rounding_are_said(directory, caplog):
    rename_tensors(directory, lambda name: name.replace(".1.mlp.router.", ".1.mlp.router.linear."))
    change_tensors(directory, {"model.norm.weight": torch.ones(96), "lm_head.bias": torch.ones(40)})
    opened, router = Checkpoint(directory), "model.layers.1.mlp.router"
    assert opened.renamed == {f"{router}.{kind}": f"{router}.linear.{kind}" for kind in ("bias", "weight")}
    with caplog.at_level("INFO", logger="vllm.mxfp4_sm120"):
        load_checked(directory)
    other, left_out, rounded = sorted(caplog.messages)
    assert left_out == "mxfp4_sm120: checkpoint: left out, for GPT-OSS has no such tensors: lm_head.bias"
    assert other.startswith("mxfp4_sm120: checkpoint: known by other names: ")
    assert f"{router}.weight ({router}.linear.weight there)" in other
    assert rounded == "mxfp4_sm120: checkpoint: rounded to BF16: model.norm.weight (F32)"
