# SPDX-License-Identifier: Apache-2.0
"""pack and unpack: every way of saving, bytes that come back, what ends a run, what is refused."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.checkpoints import CONFIG, SHARD, change_config, change_tensors, write_small
from vllm_mxfp4_sm120 import mxfp4, packing
from vllm_mxfp4_sm120.checkpoint import Checkpoint, Sizes, Writer
from vllm_mxfp4_sm120.cli.__main__ import main
from vllm_mxfp4_sm120.moe import MoEWeights
from vllm_mxfp4_sm120.packing import Options, manifest

pytestmark = pytest.mark.usefixtures("one_thread")
State = dict[str, Tensor]
SQUARE = {**CONFIG, "intermediate_size": 96}  # `down` tells nothing of its orientation, as in the published models
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


def tensors_of(directory: Path) -> State:
    """Of the shards that the index names."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {name: tensor for file in set(index.values()) for name, tensor in load_file(directory / file).items()}
    assert tensors.keys() == index.keys()
    return tensors


def assert_same(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


@pytest.fixture(scope="module", params=[CONFIG, SQUARE], ids=["", "square"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packed") / "model"
    write_small(directory, request.param)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "optimizer.pt").write_text("a trainer's")
    return directory


@pytest.fixture(scope="module")
def bf16(packed: Path) -> Path:
    directory = packed.with_name("bf16")
    packing.unpack(packed, directory)
    return directory


@pytest.fixture
def tuned(bf16: Path, tmp_path: Path) -> Path:
    """Floats that no block holds exactly, in one file, without what `unpack` left beside it."""
    directory = tmp_path / "tuned"
    directory.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(bf16 / name, directory)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (tensor * (1 + 0.1 * torch.randn(tensor.shape, generator=generator))).bfloat16()
        for name, tensor in tensors_of(bf16).items()
    }
    save_file(tensors, directory / SHARD)
    return directory


# There and back


def test_packed_unpacked_packed_is_the_same_bytes(packed: Path, bf16: Path, tmp_path: Path) -> None:
    packing.pack(bf16, tmp_path / "again")
    assert_same(tensors_of(tmp_path / "again"), tensors_of(packed))
    packing.unpack(tmp_path / "again", tmp_path / "bf16")
    packing.pack(tmp_path / "bf16", tmp_path / "third")
    for name in sorted(file.name for file in (tmp_path / "again").iterdir()):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "third" / name).read_bytes(), name


def test_every_block_comes_back_whatever_its_scale(tmp_path: Path) -> None:
    """All bytes as codes, both zeros among them; scales that nobody would choose; blocks of nothing but zeros."""
    sizes = Sizes.from_config(CONFIG)
    generator = torch.Generator().manual_seed(3)
    layers = write_small(tmp_path / "model")
    with Writer(tmp_path / "odd") as writer:
        for name, tensor in tensors_of(tmp_path / "model").items():
            if not name.endswith(("_blocks", "_scales")):
                writer.add(name, tensor)
        for layer, weights in enumerate(layers):
            for codes, scales in weights.by_checkpoint_name().values():
                codes.copy_(torch.randint(0, 256, codes.shape, dtype=torch.uint8, generator=generator))
                zeros = torch.rand(scales.shape, generator=generator) < 0.2
                codes[zeros.repeat_interleave(mxfp4.BLOCK // 2, -1)] &= 0x88
                scales.copy_(torch.randint(0, mxfp4.MAX_FINITE_SCALE + 1, scales.shape, generator=generator))
            odd = MoEWeights(**{**vars(weights), "w13_bias": None, "w2_bias": None})
            writer.add_experts(layer, odd)
        writer.write_json("config.json", CONFIG)
    packing.unpack(tmp_path / "odd", tmp_path / "bf16")
    assert list((tmp_path / "bf16").glob("mxfp4_scales-*")), "no scale was odd: the test tests nothing"
    packing.pack(tmp_path / "bf16", tmp_path / "again")
    assert_same(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "odd"))
    assert sizes == Checkpoint(tmp_path / "again").sizes


def test_transformers_saves_what_is_packed_and_reads_the_result(tmp_path: Path) -> None:
    """The small model as transformers dequantizes and saves it; packing that gives its own bytes, without any hint."""
    from transformers import GptOssConfig, GptOssForCausalLM, Mxfp4Config

    small = Path(__file__).parents[2] / "models" / "gpt-oss-small" / "checkpoint"

    def load(directory: Path) -> GptOssForCausalLM:
        return GptOssForCausalLM.from_pretrained(directory, quantization_config=Mxfp4Config(dequantize=True))

    model = load(small)
    # One that was never packed: transformers 5.19 saves the other without its experts' weights.
    config = GptOssConfig.from_pretrained(small, dtype=torch.bfloat16)
    del config.quantization_config
    plain = GptOssForCausalLM(config).bfloat16()
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(tmp_path / "saved")
    packing.pack(tmp_path / "saved", tmp_path / "packed")
    assert_same(tensors_of(tmp_path / "packed"), tensors_of(small))
    assert_same(load(tmp_path / "packed").state_dict(), model.state_dict())


def test_what_lies_beside_the_weights_is_kept(packed: Path, bf16: Path, tmp_path: Path) -> None:
    packing.pack(bf16, tmp_path / "again")
    kept = {"tokenizer.json", "chat_template.jinja"}
    assert kept <= {file.name for file in (tmp_path / "again").iterdir()}
    assert not (tmp_path / "again" / "optimizer.pt").exists()
    method = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert method["quant_method"] == "mxfp4" and "lm_head" in method["modules_to_not_convert"]
    assert "quantization_config" not in json.loads((bf16 / "config.json").read_text())
    assert packing.verify(tmp_path / "again") == []


# Ways of saving


def each_expert(state: State, name: Callable[[str, int, str], str]) -> State:
    """One tensor per expert, a linear layer's [rows, K]."""
    apart = {}
    for key, tensor in state.items():
        match = re.fullmatch(r"(.*)\.(gate_up_proj|down_proj)(_bias)?", key)
        for expert in range(len(tensor)) if match else ():
            kind = "bias" if match[3] else "weight"
            apart[f"{match[1]}.{name(match[2], expert, kind)}"] = tensor[expert] if match[3] else tensor[expert].T
        if not match:
            apart[key] = tensor
    return apart


def gate_and_up(state: State, names: dict[str, str]) -> State:
    """Gate and up in tensors of their own."""
    apart = {}
    for key, tensor in each_expert(state, lambda part, expert, kind: f"{expert}.{part}.{kind}").items():
        if ".gate_up_proj." in key:
            apart[key.replace("gate_up_proj", names["gate"])] = tensor[::2]
            apart[key.replace("gate_up_proj", names["up"])] = tensor[1::2]
        else:
            apart[key.replace("down_proj", names["down"]) if ".experts." in key else key] = tensor
    return apart


def openai(state: State) -> State:
    """openai/gpt-oss's own names; its weights are [E, rows, K]."""
    spelled = {}
    for key, tensor in state.items():
        tensor = tensor.mT if key.endswith(("gate_up_proj", "down_proj")) else tensor
        for pattern, text in (
            (r"^model\.layers\.", "block."),
            (r"mlp\.experts\.gate_up_proj$", "mlp.mlp1_weight"),
            (r"mlp\.experts\.down_proj$", "mlp.mlp2_weight"),
            (r"mlp\.experts\.gate_up_proj_bias", "mlp.mlp1_bias"),
            (r"mlp\.experts\.down_proj_bias", "mlp.mlp2_bias"),
            (r"mlp\.router", "mlp.gate"),
            (r"^model\.embed_tokens", "embedding"),
            (r"^lm_head", "unembedding"),
        ):
            key = re.sub(pattern, text, key)
        spelled[key] = tensor
    return spelled


def peft(state: State) -> State:
    """A PeftModel's state after merge_adapter: its prefix, and base_layer where a LoRA was."""
    wrapped = {f"base_model.model.{key}": tensor for key, tensor in state.items()}
    return {
        re.sub(r"(q_proj|v_proj)\.", r"\1.base_layer.", key).replace(".experts.", ".experts.base_layer."): tensor
        for key, tensor in wrapped.items()
    }


HF = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
WAYS: dict[str, Callable[[State], State]] = {
    "transformers": lambda state: state,
    "float32": lambda state: {key: tensor.float() for key, tensor in state.items()},
    "fsdp": lambda state: {f"_fsdp_wrapped_module.{key}": tensor for key, tensor in state.items()},
    "peft": peft,
    "openai": openai,
    "unsloth": lambda state: {
        key.replace(".router.", ".router.linear."): tensor
        for key, tensor in each_expert(state, lambda part, expert, kind: f"{part}s.{expert}.{kind}").items()
    },
    "numbered": lambda state: each_expert(state, lambda part, expert, kind: f"{expert}.{part}.{kind}"),
    "gate and up": lambda state: gate_and_up(state, HF),
    "w1 w3 w2": lambda state: gate_and_up(state, {"gate": "w1", "up": "w3", "down": "w2"}),
    "without peft's prefix": lambda state: {key.removeprefix("model."): tensor for key, tensor in state.items()},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_saving(way: str, tuned: Path, tmp_path: Path) -> None:
    packing.pack(tuned, tmp_path / "plain")
    saved = {key: tensor.contiguous() for key, tensor in WAYS[way](load_file(tuned / SHARD)).items()}
    save_file(saved, tuned / SHARD)
    change_config(tuned, dtype="float32", torch_dtype="float16")  # transformers 5's name, and 4's
    report = packing.pack(tuned, tmp_path / "packed")
    assert report.left_out == []
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert_same(tensors_of(tmp_path / "packed"), tensors_of(tmp_path / "plain"))
    # What was written is near what was read, by transformers' reading.
    assert all(0.05 < each.relative_rms < 0.2 for each in report.projections)


def test_packed_experts_stay_as_they_are(packed: Path, tmp_path: Path) -> None:
    report = packing.pack(packed, tmp_path / "again")
    assert_same(tensors_of(tmp_path / "again"), tensors_of(packed))
    assert {each.relative_rms for each in report.projections} == {None}


# What ends a run


def stop_at(step: int) -> Callable[[str, int, int], None]:
    """Ctrl-C, as the terminal sends it, at that call."""
    calls = iter(range(1000))
    return lambda *_: signal.raise_signal(signal.SIGINT) if next(calls) == step else None


@pytest.mark.parametrize("step", [0, 3, 20, 36])
def test_a_run_that_was_stopped_goes_on(step: int, tuned: Path, tmp_path: Path) -> None:
    options = Options(shard_bytes=20_000)
    packing.pack(tuned, tmp_path / "whole", options)
    with pytest.raises(packing.Stopped, match="the same command goes on"):
        packing.pack(tuned, tmp_path / "packed", options, stop_at(step))
    assert not (tmp_path / "packed").exists()
    draft = tmp_path / "packed.partial"
    before = {file.name: file.stat().st_mtime_ns for file in draft.glob("*.safetensors")}
    (draft / "model-00009-of-00009.safetensors.part").write_text("what a power failure leaves")
    packing.pack(tuned, tmp_path / "packed", options)
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "packed").iterdir()}
    assert before.items() <= after.items()
    assert after.keys() == {file.name for file in (tmp_path / "whole").iterdir()}
    for name in after:
        assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not draft.exists()


def stopped(tuned: Path, target: Path) -> Path:
    with pytest.raises(packing.Stopped):
        packing.pack(tuned, target, Options(shard_bytes=20_000), stop_at(20))
    return target.with_name(f"{target.name}.partial")


def test_a_draft_of_something_else_is_left_alone(tuned: Path, tmp_path: Path) -> None:
    draft = stopped(tuned, tmp_path / "packed")
    with pytest.raises(ValueError, match="of another source, version or other options"):
        packing.pack(tuned, tmp_path / "packed", Options(search=True, shard_bytes=20_000))
    shard = next(draft.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=f"{shard.name}: not as it was written"):
        packing.pack(tuned, tmp_path / "packed", Options(shard_bytes=20_000))
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "notes").write_text("a user's")
    with pytest.raises(ValueError, match="not an unfinished checkpoint"):
        packing.pack(tuned, tmp_path / "mine")
    assert (tmp_path / "mine.partial" / "notes").read_text() == "a user's"


def test_two_processes_do_not_write_one_folder(tuned: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def second(*_: object) -> None:
        if not refused:
            with pytest.raises(BlockingIOError, match="another process is writing it") as caught:
                packing.pack(tuned, tmp_path / "packed")
            refused.append(str(caught.value))

    packing.pack(tuned, tmp_path / "packed", progress=second)
    assert refused and packing.verify(tmp_path / "packed") == []


def test_a_full_disk_and_a_taken_name_are_seen_at_once(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="already exists"):
        packing.pack(tuned, tuned)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(ValueError, match="5 are free there"):
        packing.pack(tuned, tmp_path / "packed")


def test_a_link_is_not_replaced(tuned: Path, tmp_path: Path) -> None:
    """Said before the work, not after it."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(ValueError, match="link: a link or a mount point, expected a new name"):
        packing.pack(tuned, tmp_path / "link")


def test_the_manifest_tells_what_was_changed(tuned: Path, tmp_path: Path) -> None:
    packing.pack(tuned, tmp_path / "packed")
    (tmp_path / "packed" / "config.json").write_text("{}")
    (tmp_path / "packed" / "tokenizer.json").unlink()
    wrong = packing.verify(tmp_path / "packed")
    assert len(wrong) == 2 and "config.json: its SHA-256" in wrong[0] and "tokenizer.json: no such file" in wrong[1]
    (tmp_path / "packed" / manifest.SUMS).write_text("")
    with pytest.raises(ValueError, match="lists no files"):
        packing.verify(tmp_path / "packed")
    (tmp_path / "packed" / manifest.SUMS).write_text("nonsense\n")
    with pytest.raises(ValueError, match="line 1 is 'nonsense'"):
        packing.verify(tmp_path / "packed")


def test_the_command_says_what_it_did(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["pack", str(tuned), str(tmp_path / "packed"), "--search", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["projections"]) == 4 and report["directory"] == str(tmp_path / "packed")
    assert report["tokenizer"]
    assert main(["unpack", str(tmp_path / "packed"), str(tmp_path / "bf16")]) == 0
    assert "wrote" in capsys.readouterr().out
    (tuned / "tokenizer.json").unlink()
    assert main(["pack", str(tuned), str(tmp_path / "again")]) == 0
    out, err = capsys.readouterr()
    assert "gate_up_proj" in out and "dB" in out and "GB" in err
    assert "no tokenizer was beside the weights: copy the base model's" in out
    assert main(["pack", str(tuned), str(tmp_path / "other"), "--device", "nowhere"]) == 2
    assert "--device nowhere" in capsys.readouterr().err
    monkeypatch.setattr(packing, "pack", lambda *_: (_ for _ in ()).throw(packing.Stopped("stopped; it goes on")))
    assert main(["pack", str(tuned), str(tmp_path / "other")]) == 130


def test_another_quantization_and_no_model_are_refused(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "copy")
    change_config(tmp_path / "copy", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ValueError, match="'bitsandbytes', expected a BF16 model"):
        packing.pack(tmp_path / "copy", tmp_path / "out")
    with pytest.raises(ValueError, match="nowhere: no such directory"):
        packing.pack(tmp_path / "nowhere", tmp_path / "out")


def test_unpacking_floats_is_refused(bf16: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is nothing to unpack"):
        packing.unpack(bf16, tmp_path / "out")


def test_scales_that_are_nan_are_refused(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "copy")
    scales = tensors_of(packed)[f"{GATE_UP}_scales"]
    scales[2, 1, 0] = 255
    change_tensors(tmp_path / "copy", {f"{GATE_UP}_scales": scales})
    for convert in (packing.pack, packing.unpack):
        with pytest.raises(ValueError, match=r"scales\[2, 1, 0\] is 255 \(NaN\)"):
            convert(tmp_path / "copy", tmp_path / convert.__name__)
