# SPDX-License-Identifier: Apache-2.0
"""benchmarks/quality.py and activations.py without a model: what a figure means, and what a setting may be."""

from __future__ import annotations

import math

import activations
import pytest
import quality
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
