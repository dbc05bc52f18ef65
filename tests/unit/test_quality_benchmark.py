# SPDX-License-Identifier: Apache-2.0
"""benchmarks/quality.py and activations.py without a model: what a figure means, and what a setting may be."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import activations
import pytest
import quality
import quality_logits
import torch
from quality_logits import Logits, Recorder, Setting


def test_figures_by_hand() -> None:
    """Two tokens: the same distribution, and (1/2, 1/4, 1/4) against (1/4, 1/4, 1/2)."""
    a = torch.tensor([[0.0, 0.0, math.log(2)], [math.log(2), 0.0, 0.0]])
    b = torch.tensor([[1.0, 1.0, 1 + math.log(2)], [0.0, 0.0, math.log(2)]])
    figures = quality.compare(a, b, torch.tensor([2, 0]))
    assert figures.tokens == 2 and figures.equal_greedy == 0.5
    assert figures.perplexity_a == pytest.approx(2) and figures.perplexity_b == pytest.approx(math.sqrt(8))
    assert figures.kl_max == pytest.approx(math.log(2) / 4) and figures.kl_mean == pytest.approx(math.log(2) / 8)
    assert figures.perplexity_change == pytest.approx(math.sqrt(2) - 1)


def test_figures_are_those_of_torch_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    a, noise = torch.randn(2, 500, 70, dtype=torch.float64, generator=generator).unbind()
    b, tokens = a + noise / 10, torch.randint(70, (500,), generator=generator)
    monkeypatch.setattr(quality, "CHUNK", 7 * 70)
    seen: list[int] = []
    figures = quality.compare(a, b, tokens, seen.append)
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert figures.kl_mean == pytest.approx(kl.mean().item())
    assert figures.kl_p99 == pytest.approx(kl.quantile(0.99).item())
    loss = torch.nn.functional.cross_entropy(b, tokens)
    assert figures.perplexity_b == pytest.approx(loss.exp().item())
    assert sum(seen) == 500 and max(seen) == 7


def test_shapes_must_match() -> None:
    with pytest.raises(ValueError, match=r"\[3, 4\] and \[3, 5\] for \[3\] tokens"):
        quality.compare(torch.zeros(3, 4), torch.zeros(3, 5), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_come_back_from_their_file(dtype: torch.dtype, tmp_path) -> None:
    logits = torch.randn(300, 11).to(dtype)
    recorder = Recorder(tmp_path / "logits")
    for part in logits.split(77):
        recorder.add(part)
    written = recorder.close("a test")
    assert written == Logits(300, 11, str(dtype).removeprefix("torch."), "a test")
    assert torch.equal(written.open(tmp_path / "logits"), logits)


@pytest.mark.parametrize(
    ("words", "by_transformers", "arguments"),
    [
        (["backend=tiled"], False, {"additional_config": {"mxfp4_sm120": {"backend": "tiled"}}}),
        (["quantization=mxfp4", "moe_backend=marlin"], False, {"quantization": "mxfp4", "moe_backend": "marlin"}),
        (["enforce_eager=false", 'hf_overrides={"a": 1}'], False, {"enforce_eager": False, "hf_overrides": {"a": 1}}),
        (["transformers", "dtype=float32"], True, {"dtype": "float32"}),
    ],
)
def test_settings(words: list[str], by_transformers: bool, arguments: dict) -> None:
    setting = Setting.parse(words)
    assert setting.by_transformers is by_transformers
    assert setting.arguments.items() >= arguments.items()


@pytest.mark.parametrize("words", [["tiled"], ["=1"], ["transformers", "float32"], ["back-end=tiled"]])
def test_what_is_no_setting(words: list[str]) -> None:
    with pytest.raises(ValueError, match=f"'{words[-1]}' is not a setting"):
        Setting.parse(words)


def test_statistics_of_activations() -> None:
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 20
    found = activations.statistics(x)
    assert found["absmax"] == x.abs().max().item()
    assert list(found["outlier_columns"]) == [5] and found["largest_column"] == pytest.approx(20, rel=0.05)
    normal = activations.statistics(torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)))
    assert normal["kurtosis"] == pytest.approx(3, abs=0.1)
    assert normal["percentiles_in_rms"]["99"] == pytest.approx(2.576, rel=0.02)
    assert 2 < normal["block_ratio"]["50"] < 2.6 and not normal["outlier_columns"]
    assert activations.statistics(torch.zeros(2, 32))["absmax"] == 0


def test_logits_of_another_order_are_noticed() -> None:
    logits = Logits(2, 3, "float32", "vLLM", own_perplexity=20.0)
    quality.check_own(logits, 20.001)
    quality.check_own(Logits(2, 3, "float32", "transformers"), 5.0)
    with pytest.raises(RuntimeError, match=r"says that perplexity is 20\.000; its logits say 25\.000"):
        quality.check_own(logits, 25.0)


class Runner(torch.nn.Module):
    """A model whose logits are its hidden states."""

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


@pytest.mark.parametrize("calls", [(1, 9), (1, 10), (1, 8, 2), (1, 9, 1), (9, 1)], ids=str)
def test_a_prompts_rows_are_recorded(calls: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However vLLM's runners cut them: nine rows of each of two prompts, none of the generated tokens'."""
    distributed = SimpleNamespace(
        get_pp_group=lambda: SimpleNamespace(is_last_rank=True), get_tensor_model_parallel_rank=lambda: 0
    )
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    model, wanted = Runner(), []
    quality_logits.start_recording(model, str(tmp_path / "logits"))
    for prompt in range(2):
        quality_logits.expect(model, 9)
        rows = 100 * (prompt + 1) + torch.arange(10.0)[:, None].expand(-1, 3)
        wanted.append(rows[:9])
        at = 0
        for count in calls:
            if count == 1:
                model.compute_logits(torch.zeros(1, 3))
            else:
                model.compute_logits(rows[at : at + count])
                at += count
    recorded = Logits(**quality_logits.stop_recording(model))
    assert torch.equal(recorded.open(tmp_path / "logits"), torch.cat(wanted))
    assert model.compute_logits(torch.ones(2, 2)).sum() == 4 and "compute_logits" not in vars(model)


def test_the_program_compares_transformers_with_itself(tmp_path: Path) -> None:
    """The whole of it but the engine: a process for each setting, the table, JSON."""
    pytest.importorskip("rich")
    command = [sys.executable, quality.__file__, "--tokens", "128", "--window", "64", "--json", str(tmp_path / "json")]
    command += ["--a", "transformers", "dtype=float32", "--b", "transformers"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "json").read_text())
    assert found["tokens"] == 126 and "perplexity" in done.stdout
    assert (
        found["a"]["computed_by"] == "transformers, float32" and found["b"]["computed_by"] == "transformers, bfloat16"
    )
    assert 0 < found["kl_mean"] < 1e-2 and 0.9 < found["equal_greedy"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", "2"], "windows of 2 tokens, expected at least 3"),
        (["--tokens", "10"], "10 tokens of text don't fill a window of 1024"),
        (["--b", "tiled"], "'tiled' is not a setting"),
        (["--text", "/no/text"], "No such file"),
    ],
)
def test_what_it_refuses(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["quality.py", *arguments])
    with pytest.raises(SystemExit, match=re.escape(message)):
        quality.main()


def test_activations_are_what_enters_the_products() -> None:
    """Of one layer: the norm's output, and a row of SwiGLU's for each expert that a token chose."""
    model = quality_logits.load_transformers(str(quality.SMALL / "checkpoint"), "float32")
    normed: list[torch.Tensor] = []
    layer = model.model.layers[3]
    layer.post_attention_layernorm.register_forward_hook(lambda module, given, output: normed.append(output[0]))
    ids = list(range(100, 164))
    with torch.no_grad():
        before = model(torch.tensor([ids])).logits
    seen = activations.record(model, [ids])
    assert sorted(seen) == sorted(f"layers.{i}.{name}" for i in range(6) for name in ("gate_up", "down"))
    assert torch.equal(seen["layers.3.gate_up"], normed[-1].bfloat16())
    down = seen["layers.3.down"]
    assert down.shape == (4 * 64, 96) and down.abs().max() <= 7 * 8
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([ids])).logits, before)  # watched, the model computes the same
