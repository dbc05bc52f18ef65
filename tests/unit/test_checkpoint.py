"""Checkpoints: written and read back, and the exact words for each way in which one can be wrong."""

import json
import math
import resource
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_mxfp4_sm120 import checkpoint
from vllm_mxfp4_sm120.checkpoint import Checkpoint, Packing, Sizes, Writer, check_scales
from vllm_mxfp4_sm120.moe import MoEWeights
from vllm_mxfp4_sm120.proof import random_weights

CONFIG = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 2,
    "num_local_experts": 3,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_experts_per_tok": 2,
    "quantization_config": {"quant_method": "mxfp4"},
}
SIZES = Sizes.from_config(CONFIG)
SCALES = "model.layers.1.mlp.experts.down_proj_scales"
BIAS = "model.layers.0.mlp.experts.gate_up_proj_bias"


@pytest.fixture(autouse=True)
def fresh_environment(monkeypatch):
    monkeypatch.delenv("MXFP4_SM120_GROUP_SIZE", raising=False)
    monkeypatch.delenv("MXFP4_SM120_PACK_LAYOUT", raising=False)
    checkpoint._overrides.cache_clear()
    yield
    checkpoint._overrides.cache_clear()


def write(directory, shard_bytes=1 << 30) -> list[MoEWeights]:
    layers = [random_weights(SIZES.layer, "cpu", seed) for seed in range(SIZES.num_layers)]
    with Writer(directory, shard_bytes) as writer:
        for layer, weights in enumerate(layers):
            writer.add_experts(layer, weights)
        writer.write_json("config.json", CONFIG)
    return layers


@pytest.fixture
def directory(tmp_path):
    write(tmp_path / "model")
    return tmp_path / "model"


def change(directory, tensors):
    """Replace or, with None, remove tensors of the only shard."""
    (file,) = directory.glob("*.safetensors")
    state = load_file(file) | tensors
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, file)
    return file


def refuse(directory) -> str:
    """The reason for which the directory is refused; it stays as it was."""
    before = {path: path.stat() for path in directory.glob("*")} if directory.is_dir() else None
    with pytest.raises(ValueError) as error:
        Checkpoint(directory)
    after = {path: path.stat() for path in directory.glob("*")} if directory.is_dir() else None
    assert "\n" not in str(error.value)
    assert before is None or [s.st_mtime_ns for s in before.values()] == [s.st_mtime_ns for s in after.values()]
    return str(error.value)


def change_config(directory, **values):
    (directory / "config.json").write_text(json.dumps(CONFIG | values))


@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000, 1])
def test_what_is_written_is_read_back(tmp_path, shard_bytes):
    layers = write(tmp_path / "model", shard_bytes)
    opened = Checkpoint(tmp_path / "model")
    assert opened.sizes == SIZES
    assert opened.packing == Packing(32, "low_nibble_first")
    for layer, weights in enumerate(layers):
        for name, tensor in vars(opened.read_layer(layer)).items():
            assert torch.equal(tensor, getattr(weights, name)), name


def test_the_layout_is_the_published_one(directory):
    weights = random_weights(SIZES.layer, "cpu", 0)
    (file,) = directory.glob("*.safetensors")
    assert file.name == "model-00001-of-00001.safetensors"
    state = load_file(file)
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
    assert index["weight_map"] == dict.fromkeys(state, file.name)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())


def test_shards_hold_no_more_than_they_may(tmp_path):
    write(tmp_path / "model", 20_000)
    shards = list((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 20_000


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


def test_truncated_safetensors(directory):
    (file,) = directory.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    size = file.stat().st_size
    assert refuse(directory) == (
        f"{file}: cut short or damaged at {size} bytes, expected a whole safetensors file; fetch it again"
    )


def test_an_empty_shard(directory):
    (file,) = directory.glob("*.safetensors")
    file.write_bytes(b"")
    assert refuse(directory) == (
        f"{file}: cut short or damaged at 0 bytes, expected a whole safetensors file; fetch it again"
    )


def test_a_shard_that_the_index_names_is_missing(directory):
    (file,) = directory.glob("*.safetensors")
    file.unlink()
    assert refuse(directory) == f"{file}: no such file, expected a shard of the checkpoint; fetch it again"


def test_no_weights_at_all(directory):
    for file in directory.glob("model*"):
        file.unlink()
    assert refuse(directory) == (
        f"{directory}: no *.safetensors here, expected the model's weights; fetch the checkpoint again"
    )


def test_missing_scales(directory):
    change(directory, {SCALES: None})
    assert refuse(directory) == f"{directory}: {SCALES} is missing, expected U8 [3, 96, 2]; fetch the checkpoint again"


def test_wrong_dtype(directory):
    file = change(directory, {BIAS: torch.zeros(3, 128)})
    assert refuse(directory) == (
        f"{file}: {BIAS} is F32 [3, 128], expected BF16 [3, 128]; "
        "config.json and weights don't belong together, fetch the checkpoint again"
    )


def test_wrong_shape(directory):
    file = change(directory, {SCALES: torch.zeros(3, 96, 4, dtype=torch.uint8)})
    assert refuse(directory) == (
        f"{file}: {SCALES} is U8 [3, 96, 4], expected U8 [3, 96, 2]; "
        "config.json and weights don't belong together, fetch the checkpoint again"
    )


def test_a_full_size_checkpoint_is_checked_from_its_headers_alone(tmp_path):
    """gpt-oss-20b's expert tensors, 12 GB, in files that are one hole behind their headers."""
    sizes = Sizes(num_layers=24, num_experts=32, hidden_size=2880, intermediate_size=2880, top_k=4)
    config = CONFIG | {"num_hidden_layers": 24, "num_local_experts": 32, "hidden_size": 2880, "intermediate_size": 2880}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for layer in range(sizes.num_layers):
        header, end = {}, 0
        for name, info in checkpoint.expert_tensors(sizes, layer).items():
            start, end = end, end + math.prod(info.shape) * (2 if info.dtype == "BF16" else 1)
            header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (tmp_path / f"{layer}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    opened = Checkpoint(tmp_path)
    assert len(opened.tensors) == 24 * 6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB: pages read would count


def test_scale_code_255(directory):
    scales = torch.full((3, 96, 2), 120, dtype=torch.uint8)
    scales[1, 90, 1] = scales[2, 0, 0] = 255
    change(directory, {SCALES: scales})
    opened = Checkpoint(directory)
    opened.read_layer(0)
    with pytest.raises(ValueError) as error:
        opened.read_layer(1)
    assert str(error.value) == (
        f"{SCALES}: 2 of 576 scales are 255 (NaN), first at [1, 90, 1], expected 0 to 254; "
        "the checkpoint is damaged, fetch it again"
    )


def test_scales_up_to_254_pass():
    check_scales("scales", torch.arange(255, dtype=torch.uint8))
    check_scales("none", torch.zeros(0, 4, dtype=torch.uint8))


def test_group_size_16(directory):
    change_config(directory, quantization_config={"quant_method": "mxfp4", "group_size": 16})
    assert refuse(directory) == (
        f"{directory}/config.json: group_size is 16, expected 32; if the file is wrong, set MXFP4_SM120_GROUP_SIZE=32"
    )


def test_unknown_pack_layout(directory):
    change_config(directory, quantization_config={"quant_method": "mxfp4", "pack_layout": "planar"})
    assert refuse(directory) == (
        f"{directory}/config.json: pack_layout is 'planar', expected 'low_nibble_first'; "
        "if the file is wrong, set MXFP4_SM120_PACK_LAYOUT=low_nibble_first"
    )


def test_the_environment_goes_before_the_file_and_is_read_once(directory, monkeypatch):
    change_config(directory, quantization_config={"quant_method": "mxfp4", "group_size": 16, "pack_layout": "planar"})
    monkeypatch.setenv("MXFP4_SM120_GROUP_SIZE", "32")
    monkeypatch.setenv("MXFP4_SM120_PACK_LAYOUT", "low_nibble_first")
    assert Checkpoint(directory).packing == Packing()
    monkeypatch.delenv("MXFP4_SM120_GROUP_SIZE")
    assert Checkpoint(directory).packing == Packing()


def test_not_gpt_oss(directory):
    change_config(directory, model_type="llama")
    assert refuse(directory) == (
        f"{directory}/config.json: model_type is 'llama', expected 'gpt_oss'; this plugin serves GPT-OSS only"
    )


@pytest.mark.parametrize("quantization", [None, {"quant_method": "fp8"}])
def test_not_mxfp4(directory, quantization):
    change_config(directory, quantization_config=quantization)
    method = (quantization or {}).get("quant_method")
    assert refuse(directory) == (
        f"{directory}/config.json: quant_method is {method!r}, expected 'mxfp4'; "
        "this plugin serves packed MXFP4 experts only"
    )


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("hidden_size", 100, "a positive multiple of 32"),
        ("intermediate_size", None, "a positive multiple of 32"),
        ("num_local_experts", "32", "a positive integer"),
        ("num_hidden_layers", 0, "a positive integer"),
    ],
)
def test_sizes_that_make_no_sense(directory, key, value, kind):
    change_config(directory, **{key: value})
    assert refuse(directory) == f"{directory}/config.json: {key} is {value!r}, expected {kind}; the file is damaged"


def test_no_such_directory(tmp_path):
    assert refuse(tmp_path / "nowhere") == (
        f"{tmp_path}/nowhere: no such directory, expected one that holds a checkpoint"
    )


def test_a_file_where_a_directory_should_be(tmp_path):
    (tmp_path / "file").write_text("")
    assert refuse(tmp_path / "file") == f"{tmp_path}/file: not a directory, expected a readable checkpoint"


def test_an_unreadable_directory(directory, monkeypatch):
    """Permissions don't stop the superuser that tests may run as, so the refusal is simulated."""

    def listdir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint.os, "listdir", listdir)
    assert refuse(directory) == f"{directory}: permission denied, expected a readable checkpoint"


def test_no_config(directory):
    (directory / "config.json").unlink()
    assert refuse(directory) == (
        f"{directory}/config.json: no such file, expected a checkpoint's config.json; is this a model's directory?"
    )


def test_config_that_is_not_json(directory):
    (directory / "config.json").write_text('{"model_type": ')
    assert refuse(directory) == f"{directory}/config.json: not JSON; fetch the checkpoint again"
    (directory / "config.json").write_text("[]")
    assert refuse(directory) == (
        f"{directory}/config.json: holds list, expected a JSON object; fetch the checkpoint again"
    )


def test_without_an_index_every_shard_is_read(directory):
    (directory / "model.safetensors.index.json").unlink()
    shutil.move(directory / "model-00001-of-00001.safetensors", directory / "model.safetensors")
    assert len(Checkpoint(directory).tensors) == 12
