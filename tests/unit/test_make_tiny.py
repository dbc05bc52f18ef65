# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of published sizes: what they would take, and that a disk without room gets nothing."""

from __future__ import annotations

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from vllm_mxfp4_sm120 import config_path
from vllm_mxfp4_sm120.checkpoint import Checkpoint
from vllm_mxfp4_sm120.cli import make_tiny
from vllm_mxfp4_sm120.cli.__main__ import main


@pytest.mark.parametrize("name", make_tiny.LIKE)
def test_published_sizes(name: str):
    """The published checkpoints' own `total_size`, within a thousandth (norms and sinks are not counted)."""
    published = {"openai/gpt-oss-20b": 13_761_264_768, "openai/gpt-oss-120b": 65_248_815_744}
    config = json.loads(config_path("models", name.split("/")[1] + ".json").read_text())
    assert make_tiny.checkpoint_bytes(config) == pytest.approx(published[name], rel=1e-3)


def test_what_is_written_is_what_was_counted(tmp_path):
    config = json.loads(config_path("tiny", "config.json").read_text())
    make_tiny.make_tiny(tmp_path / "tiny", config)
    written = sum(file.stat().st_size for file in (tmp_path / "tiny").glob("*.safetensors"))
    assert make_tiny.checkpoint_bytes(config) == pytest.approx(written, rel=0.05)
    assert len(Checkpoint(tmp_path / "tiny").tensors) > 0


def test_fewer_layers(tmp_path):
    assert main(["make-tiny", "--layers", "1", str(tmp_path / "one")]) == 0
    assert json.loads((tmp_path / "one" / "config.json").read_text())["layer_types"] == ["sliding_attention"]


@pytest.mark.parametrize(
    ("change", "arguments", "line"),
    [
        ({}, ["--layers", "3"], "--layers is 3, expected 1 to 2"),
        ({}, ["--seed", "-1"], "--seed is -1, expected 0 to 2^63 - 1"),
        ({}, ["--seed", str(1 << 70)], "expected 0 to 2^63 - 1"),
        ({"model_type": "llama"}, [], "config.json: model_type is 'llama', expected 'gpt_oss'"),
        ({"head_dim": None, "pad_token_id": None}, [], "config.json: head_dim, pad_token_id missing, expected as in"),
        ({"num_local_experts": 128}, [], "config.json: 128 experts of a hidden size of 192, expected at most half as"),
        ("{", [], "config.json: not JSON"),
        (b"\xff\xfe", [], "config.json: not JSON"),
    ],
)
def test_wrong_arguments(change, arguments, line, tmp_path, capsys):
    path = tmp_path / "config.json"
    if isinstance(change, dict):
        change = json.dumps(json.loads(config_path("tiny", "config.json").read_text()) | change)
    path.write_bytes(change if isinstance(change, bytes) else change.encode())
    assert main(["make-tiny", "--config", str(path), *arguments, str(tmp_path / "new")]) == (2 if arguments else 1)
    (said,) = capsys.readouterr().err.splitlines()[-1:]
    assert line in said and [each.name for each in tmp_path.iterdir()] == ["config.json"]


def test_no_room_on_the_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert main(["make-tiny", "--like", "openai/gpt-oss-20b", str(tmp_path / "like")]) != 0
    assert "bytes, 1000 are free there; choose another disk" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_same_numbers_whichever_thread_draws_them():
    """Three pieces each, and every byte there is."""

    def draw(seed):
        with make_tiny.Dice(seed) as dice:
            return dice.bytes(3, 8 * make_tiny.PIECE), dice.normal(3, make_tiny.PIECE, std=2.0, mean=1.0)

    codes, numbers = draw(0)
    assert all(torch.equal(*pair) for pair in zip((codes, numbers), draw(0), strict=True))
    assert not torch.equal(codes, draw(1)[0])
    assert not torch.equal(codes[0], codes[1])
    assert torch.bincount(codes.flatten()[::64], minlength=256).min() > 1000
    assert numbers.float().mean().item() == pytest.approx(1.0, abs=0.01)
    assert numbers.float().std().item() == pytest.approx(2.0, abs=0.01)


# What the experts decide, by transformers: tests that compare answers see experts only if answers depend on them.

TOLERANCE = 2e-2  # of a log-probability, with which engines are compared (tests/engine)
NEW_TOKENS = 32


def answers(model, forced: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Greedy tokens [prompts, NEW_TOKENS] or the forced ones, their log-probabilities, and the least lead of one."""
    prompts = torch.randint(4, 304, (8, 20), generator=torch.Generator().manual_seed(1))
    if forced is None:
        forced = model.generate(prompts, do_sample=False, max_new_tokens=NEW_TOKENS)[:, prompts.shape[1] :]
    with torch.no_grad():
        steps = model(torch.cat((prompts, forced), dim=1)).logits[:, -NEW_TOKENS - 1 : -1].float()
    best = steps.topk(2).values
    logprobs = steps.log_softmax(-1).gather(2, forced[..., None])[..., 0]
    return forced, logprobs, (best[..., 0] - best[..., 1]).min().item()


@pytest.fixture(scope="module")
def undamaged(transformers_model) -> tuple[torch.Tensor, torch.Tensor, float]:
    return answers(transformers_model)


def expert_tensors_of(model) -> list[torch.Tensor]:
    return [parameter.data for name, parameter in model.named_parameters() if ".experts." in name]


def exchange_half(model) -> None:
    """Every layer's first half of the experts, each in its neighbour's place."""
    for tensor in expert_tensors_of(model):
        half = len(tensor) // 2
        tensor[:half] = tensor[:half].roll(1, dims=0).clone()


def silence_half(model) -> None:
    for name, parameter in model.named_parameters():
        if ".down_proj" in name:
            parameter.data[: len(parameter) // 2] = 0


@pytest.mark.parametrize("damage", [exchange_half, silence_half])
def test_tokens_and_probabilities_depend_on_the_experts(transformers_model, undamaged, damage):
    tokens, logprobs, _ = undamaged
    damaged = copy.deepcopy(transformers_model)
    damage(damaged)
    assert (answers(damaged)[0] != tokens).float().mean() > 0.75
    difference = (answers(damaged, tokens)[1] - logprobs).abs()
    assert difference.median() > 5 * TOLERANCE
    assert difference.amax(dim=1).min() > 20 * TOLERANCE  # in every answer


def test_rounding_decides_nothing(transformers_model, undamaged):
    """In BF16 the same tokens, by a lead of ten tolerances, and log-probabilities well within one."""
    tokens, logprobs, lead = undamaged
    rounded = copy.deepcopy(transformers_model).bfloat16()
    assert torch.equal(answers(rounded)[0], tokens)
    assert (answers(rounded, tokens)[1] - logprobs).abs().max() < TOLERANCE / 2
    assert lead > 10 * TOLERANCE
