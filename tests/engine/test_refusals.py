# SPDX-License-Identifier: Apache-2.0
"""What can't be served is refused in one line, and the process ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.conftest import ENV
from vllm_mxfp4_sm120 import plugin
from vllm_mxfp4_sm120.checkpoint import INDEX
from vllm_mxfp4_sm120.cli.serve import Server

SHARD = "model-00001-of-00001.safetensors"
DOWN = "model.layers.1.mlp.experts.down_proj"


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def edit_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_quantization(directory: Path, **values: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    edit_config(directory, quantization_config={**config["quantization_config"], **values})


def edit_tensor(directory: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    tensors = load_file(directory / SHARD)
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    save_file(tensors, directory / SHARD, metadata={"format": "pt"})


def one_scale_255(scales: torch.Tensor) -> torch.Tensor:
    scales[3, 7, 2] = 255
    return scales


def refusal(directory: Path, **arguments: object) -> str:
    """What vLLM says as it makes its configuration, which is where a server ends that can't start."""
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    with pytest.raises(ValueError) as caught:
        EngineArgs(model=str(directory), quantization="mxfp4_sm120", **arguments).create_engine_config()  # type: ignore[arg-type]
    error = caught.value
    return str(error.errors()[0]["ctx"]["error"]) if hasattr(error, "errors") else str(error)


def test_model_that_is_not_gpt_oss(copy: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 192, "vocab_size": 304}
    (copy / "config.json").write_text(json.dumps({**config, "num_attention_heads": 6, "num_hidden_layers": 2}))
    assert refusal(copy) == (f"{copy}: model_type is 'llama', expected 'gpt_oss'; this plugin serves GPT-OSS only")


def test_checkpoint_that_is_not_mxfp4(copy: Path) -> None:
    edit_config(copy, quantization_config=None)
    assert refusal(copy) == (
        f"{copy}/config.json: quantization_config is missing, although the experts are packed; "
        'add "quantization_config": {"quant_method": "mxfp4"}'
    )


def test_activations_that_are_not_bf16(copy: Path) -> None:
    assert refusal(copy, dtype="float16") == (
        f"--quantization mxfp4_sm120 can't serve {copy}: only --dtype bfloat16 is served"
    )


def test_group_size(copy: Path) -> None:
    edit_quantization(copy, group_size=16)
    assert refusal(copy) == (
        f"{copy}/config.json: group_size is 16, expected 32; if the file is wrong, set MXFP4_SM120_GROUP_SIZE=32"
    )


def test_pack_layout(copy: Path) -> None:
    edit_quantization(copy, pack_layout="high_nibble_first")
    assert refusal(copy) == (
        f"{copy}/config.json: pack_layout is 'high_nibble_first', expected 'low_nibble_first'; "
        "if the file is wrong, set MXFP4_SM120_PACK_LAYOUT=low_nibble_first"
    )


def test_missing_scales(copy: Path) -> None:
    edit_tensor(copy, f"{DOWN}_scales", lambda _: None)
    assert refusal(copy) == (
        f"{copy / INDEX}: says that {DOWN}_scales lies in {SHARD}, which doesn't hold it; "
        "index and shards don't belong together, fetch both again"
    )


def test_wrong_dtype(copy: Path) -> None:
    edit_tensor(copy, f"{DOWN}_blocks", lambda blocks: blocks.bfloat16())
    assert refusal(copy) == (
        f"{copy / SHARD}: {DOWN}_blocks is BF16 [16, 192, 5, 16], expected U8 [16, 192, 5, 16]; "
        "config.json and weights don't belong together"
    )


def test_wrong_shape(copy: Path) -> None:
    edit_tensor(copy, f"{DOWN}_blocks", lambda blocks: blocks[:, :, :4].contiguous())
    assert refusal(copy) == (
        f"{copy / SHARD}: {DOWN}_blocks is U8 [16, 192, 4, 16], expected U8 [16, 192, 5, 16]; "
        "config.json and weights don't belong together"
    )


def test_flags(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXFP4_SM120_USE_TRITON", "yes")
    assert refusal(copy) == "MXFP4_SM120_USE_TRITON='yes' is not accepted: expected 0 or 1"


def test_an_unknown_variable(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXFP4_SM120_BACKENT", "tiled")
    assert refusal(copy) == ("MXFP4_SM120_BACKENT is not a variable of this plugin: did you mean MXFP4_SM120_BACKEND?")


# What a user meets: `vllm serve` in a process. Slow to start, so once before and once while weights are read.


def server_refusal(directory: Path, log: Path) -> str:
    """What a server said that ended by itself, its status not 0, and left the checkpoint as it was."""
    before = {path: path.read_bytes() for path in sorted(directory.rglob("*"))}
    arguments = ["--quantization", "mxfp4_sm120", "--enforce-eager", "--max-model-len", "512"]
    arguments += ["--kv-cache-memory-bytes", "67108864"]
    with Server(str(directory), arguments, log, env=ENV) as server:
        with pytest.raises(RuntimeError) as caught:
            server.wait_until_healthy(600)
        assert server.process.returncode == 1
    assert {path: path.read_bytes() for path in sorted(directory.rglob("*"))} == before
    start, end = "vllm serve ended with exit status 1: ", f"; see {log}"
    assert str(caught.value).startswith(start) and str(caught.value).endswith(end)
    return str(caught.value).removeprefix(start).removesuffix(end)


def test_serve_refuses_a_truncated_file(copy: Path, tmp_path: Path) -> None:
    shard = copy / SHARD
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert server_refusal(copy, tmp_path / "log") == (
        f"{shard}: cut short or damaged at {shard.stat().st_size} bytes, expected a whole safetensors file; "
        "fetch it again"
    )


def test_serve_refuses_a_scale_that_is_nan(copy: Path, tmp_path: Path) -> None:
    edit_tensor(copy, f"{DOWN}_scales", one_scale_255)
    assert server_refusal(copy, tmp_path / "log") == (
        f"ValueError: {DOWN}_scales[3, 7, 2] is 255 (NaN), expected 0 to 254; the checkpoint is damaged, fetch it again"
    )
