# SPDX-License-Identifier: Apache-2.0
"""inspect: all that is wrong at once, folders, caches and repositories, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import change_config, change_tensors, edit_tensors, write_small
from vllm_mxfp4_sm120 import packing
from vllm_mxfp4_sm120.checkpoint import survey as survey_module
from vllm_mxfp4_sm120.checkpoint.survey import survey
from vllm_mxfp4_sm120.cli.__main__ import main
from vllm_mxfp4_sm120.cli.inspect import examine

pytestmark = pytest.mark.usefixtures("one_thread")
LAYER = "model.layers.1.mlp.experts"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_small(tmp_path / "model")
    return tmp_path / "model"


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict]:
    status = main(["inspect", *map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_a_whole_checkpoint(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = inspect(capsys, model)
    assert (status, report["problems"], report["layout"]) == (0, [], "mxfp4")
    assert report["sizes"]["num_experts"] == 3 and report["block_size"] == 32
    sizes = {each["name"]: (each["hidden_size"], each["intermediate_size"]) for each in report["layouts"]}
    assert sizes["vLLM Marlin"] == (256, 128) and sizes["native, triton, tiled"] == (96, 64)
    assert len(report["fits"]) == 7 * 2 * 2 * 2 * 3
    assert main(["inspect", str(model)]) == 0
    out = capsys.readouterr().out
    assert "every tensor is as it should be" in out and "2 x 32 GB (RTX 5090)" in out


def test_everything_that_is_wrong_is_named(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_tensors(
        model,
        {
            f"{LAYER}.down_proj_blocks": torch.zeros(3, 96, 3, 16, dtype=torch.uint8),
            f"{LAYER}.down_proj_scales": torch.zeros(3, 96, 2),
            "lm_head.weight": None,
            "model.norm.weight": None,
            "model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(1),
            "layers.0.mlp.router.bias": torch.zeros(3),
            "model.layers.5.mlp.router.bias": torch.zeros(3),
        },
    )
    change_config(model, rms_norm_eps=1e-3)
    status, report = inspect(capsys, model)
    assert status == 1
    for name in (
        "down_proj_blocks is U8 [3, 96, 3, 16], expected U8 [3, 96, 2, 16]",
        "down_proj_scales is F32",
        "lm_head.weight (BF16 [40, 96]) missing",
        "model.norm.weight (BF16 [96]) missing",
        "lora_A",
        "are the same tensor",
        "model.layers.5.mlp.router.bias: config.json knows no such tensor",
        "rms_norm_eps is 0.001",
    ):
        assert sum(name in problem for problem in report["problems"]) == 1, name
    assert len(report["problems"]) == 8


def test_fifty_missing_tensors_are_fifty_lines(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = edit_tensors(model, lambda state: [state.pop(name) for name in list(state) if ".layers.1." in name])
    assert inspect(capsys, gone.parent)[1]["problems"][-1].startswith(f"{LAYER}.down_proj_bias")
    missing = [problem for problem in survey(str(gone.parent)).problems() if problem.endswith("missing")]
    assert len(missing) == 19


def test_what_lies_in_damaged_files_is_named_beside_the_rest(tmp_path: Path, capsys) -> None:
    write_small(tmp_path / "model", shard_bytes=12000)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    files[1].write_bytes(files[1].read_bytes()[:-1])
    files[2].unlink()
    save_file({name: tensor.double() for name, tensor in load_file(files[0]).items()}, files[0])
    status, report = inspect(capsys, tmp_path / "model")
    cut, absent, *tensors = report["problems"]
    assert status == 1 and "cut short" in cut and files[1].name in cut and files[2].name in absent
    assert "model.embed_tokens.weight is F64 [40, 96], expected BF16 [40, 96]" in tensors
    assert "lm_head.weight (BF16 [40, 96]) missing" in tensors and len(tensors) == 9


def test_no_experts_at_all(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As transformers saves a model that it has dequantized."""
    edit_tensors(model, lambda state: [state.pop(name) for name in list(state) if ".experts." in name])
    assert main(["inspect", str(model)]) == 1
    out = capsys.readouterr().out
    assert "no experts among its tensors" in out and out.endswith("12 problems\n")


def test_floats_are_for_pack(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packing.unpack(model, tmp_path / "bf16")
    status, report = inspect(capsys, tmp_path / "bf16")
    assert (status, report["layout"], report["problems"]) == (0, "bf16", [])
    edit_tensors(tmp_path / "bf16", lambda state: [state.pop(name) for name in list(state) if ".self_attn." in name])
    assert len(inspect(capsys, tmp_path / "bf16")[1]["problems"]) == 18
    change_config(tmp_path / "bf16", quantization_config={"quant_method": "bitsandbytes"})
    status, report = inspect(capsys, tmp_path / "bf16")
    assert status == 1 and "quant_method is 'bitsandbytes', expected a BF16 model" in report["problems"][0]


def test_verify_reads_the_manifest(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packing.pack(model, tmp_path / "packed")
    assert inspect(capsys, tmp_path / "packed", "--verify") == (0, inspect(capsys, tmp_path / "packed")[1])
    shard = next((tmp_path / "packed").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    assert inspect(capsys, tmp_path / "packed")[0] == 0
    status, report = inspect(capsys, tmp_path / "packed", "--verify")
    assert status == 1 and "its SHA-256 is" in report["problems"][0]


def test_a_repository_from_the_cache_or_by_its_headers(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(model))
    cached = survey("someone/model")
    assert (cached.source, cached.problems()) == ("someone/model", [])

    shard = next(model.glob("*.safetensors"))
    with safe_open(shard, "pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        tensors = {n: SimpleNamespace(dtype=s.get_dtype(), shape=s.get_shape()) for n, s in slices.items()}
    files = SimpleNamespace(files_metadata={shard.name: SimpleNamespace(tensors=tensors)})
    monkeypatch.setattr(survey_module, "_cached", lambda _: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: str(model / "config.json"))
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda _: files)
    remote = survey("someone/model")
    assert (remote.layout, remote.problems()) == ("mxfp4", [])
    # Of floats, what pack would miss.
    files.files_metadata[shard.name].tensors = {f"{LAYER}.down_proj": SimpleNamespace(dtype="BF16", shape=(3, 64, 96))}
    report = examine(survey("someone/model"))
    assert report.layout == "bf16" and f"{LAYER}.gate_up_proj (gate_up of 3 experts) missing" in report.problems
    assert survey(str(model)).headers.keys() == remote.headers.keys()


def openais(folder: Path) -> None:
    """`original/` of the published repositories."""
    config = {"num_hidden_layers": 2, "num_experts": 3, "experts_per_token": 2, "hidden_size": 96, "vocab_size": 40}
    (folder / "config.json").write_text(json.dumps(config))


def without_shards(folder: Path) -> None:
    names = {f"model.layers.{i}.x": f"model-{i}.safetensors" for i in range(2)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def in_a_cache(folder: Path) -> None:
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_text("{}")


def of_llama(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')


@pytest.mark.parametrize(
    ("name", "make", "line"),
    [
        ("a folder", lambda folder: None, "a folder: an empty folder, expected a checkpoint"),
        ("lora", lambda folder: (folder / "adapter_config.json").write_text("{}"), "lora: a LoRA without its model; "),
        ("x.gguf", lambda folder: folder.rmdir() or folder.write_bytes(b"GGUF"), "x.gguf: GGUF, which llama.cpp reads"),
        ("q4", lambda folder: (folder / "x.gguf").write_bytes(b"GGUF"), "q4: GGUF, which llama.cpp reads; expected a"),
        ("config.json", lambda folder: folder.rmdir() or folder.write_text("{}"), "a file, expected a checkpoint's"),
        ("original", openais, "original: its config.json is OpenAI's own, expected transformers'; give the folder in"),
        ("bin", lambda folder: (folder / "pytorch_model.bin").write_bytes(b""), "bin: weights as pickles (*.bin)"),
        ("models--a--b", in_a_cache, "a model, expected one snapshot; give "),
        ("llama", of_llama, "config.json: model_type is 'llama', expected 'gpt_oss'; this plugin serves GPT-OSS only"),
        ("stopped", without_shards, "stopped: model-0.safetensors, model-1.safetensors missing, of 2 shards that the"),
        ("ü 漢", of_llama, "ü 漢/config.json: model_type is 'llama', expected"),
    ],
)
def test_what_is_no_gpt_oss_is_one_line(name: str, make, line: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / name
    path.mkdir()
    if make is without_shards:
        write_small(path)
        next(path.glob("*.safetensors")).unlink()
    make(path)
    for command in (["inspect"], ["pack", str(tmp_path / "packed")]):
        assert main([command[0], str(path), *command[1:]]) == 1
        (said,) = capsys.readouterr().err.splitlines()
        assert line in said


@pytest.mark.parametrize("value", [None, "128", [], 0, 1 << 70, True])
@pytest.mark.parametrize("key", ["max_position_embeddings", "sliding_window", "quantization_config", "vocab_size"])
def test_nonsense_in_config_json_is_named(key: str, value: object, model: Path, tmp_path: Path, capsys) -> None:
    change_config(model, **{key: value})
    right = value is None and key in ("sliding_window", "max_position_embeddings")
    said = []
    for command in (["inspect", str(model)], ["pack", str(model), str(tmp_path / "packed")]):
        # `pack` wants no quantization_config, and writes its own.
        good = right or (command[0] == "pack" and key == "quantization_config" and value is None)
        assert main(command) == (0 if good else 1)
        out, err = capsys.readouterr()
        said.append(out + err)
    assert right or key in said[0]


def test_no_network_and_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(survey_module, "_cached", lambda _: None)
    assert main(["inspect", "someone/model"]) == 1
    assert "not in Hugging Face's cache; go online, or give a folder" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "none")]) == 1
    assert "no such directory" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for error, words in (
        (huggingface_hub.errors.NotASafetensorsRepoError("no"), "no *.safetensors there, expected the model's weights"),
        (
            huggingface_hub.errors.HFValidationError("Repo id\nand more"),
            "someone/model: Repo id; give a folder that is",
        ),
        (ConnectionError("no route"), "someone/model: no route; give a folder that is here"),
    ):

        def fails(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
        assert main(["inspect", "someone/model"]) == 1
        assert words in capsys.readouterr().err
    # What is published is known without one.
    status, report = inspect(capsys, "openai/gpt-oss-120b")
    assert (status, report["layout"], report["sizes"]["num_experts"]) == (0, "unknown", 128)
