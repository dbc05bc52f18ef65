"""Checkpoints of published sizes: what they would take, and that a disk without room gets nothing."""

from __future__ import annotations

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
