# SPDX-License-Identifier: Apache-2.0
"""benchmarks/formats.py and fp4_terms.py: what a number format can hold, and the study's rules."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import activations
import formats
import fp4_terms
import pytest
import quality
import quality_logits
import torch

from vllm_mxfp4_sm120 import terms


def values(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal, exponent = torch.randn(2, 40, 96, generator=generator, dtype=torch.float64).unbind()
    return (normal * exponent.exp2()).float()


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_studys_rule_of_seven_is_the_packages(count: int) -> None:
    x = values().bfloat16().double()
    rule = fp4_terms.Rule("", 7)
    assert torch.equal(x - rule.rest(x, count), terms.join(*terms.split(x.float(), count)))
    assert torch.equal(formats.FORMATS[f"mxfp4x{count}"](x), x - rule.rest(x, count))


def test_of_several_scales_the_study_takes_the_best() -> None:
    x = values().double()
    errors = {
        together: fp4_terms.Rule("", 7, steps=(-1, 0, 1), together=together).rest(x, 2).unflatten(-1, (-1, 32))
        for together in (False, True)
    }
    squares = {together: rest.square().sum(-1) for together, rest in errors.items()}
    plain = fp4_terms.Rule("", 7).rest(x, 2).unflatten(-1, (-1, 32)).square().sum(-1)
    assert bool((squares[True] <= squares[False]).all()) and bool((squares[True] <= plain).all())
    assert bool((squares[True] < plain).any())


def test_fixed_ratios() -> None:
    """1 has the scale 1/4 and the code 4; 1/16 is code 1/2 of the scale 1/8, and twice 6/256 of the scale 1/256."""
    x = torch.zeros(1, 32, dtype=torch.float64)
    x[0, :2] = torch.tensor([1.0, 1 / 16])
    assert not fp4_terms.Rule("", 7, (2,)).rest(x, 2).any()
    assert fp4_terms.Rule("", 7, (64,)).rest(x, 2)[0, 1] == 1 / 16 - 6 / 256


def test_eight_bit_formats() -> None:
    """E4M3 keeps 4 significant bits of what is within 2^14 of the scale's reach, two terms the 8 of BF16."""
    x = values().bfloat16().double()
    x[0, :32] = 0.0
    blocks = x.unflatten(-1, (-1, 32))
    large = (blocks.abs() >= blocks.abs().amax(-1, keepdim=True) * 2.0**-13).flatten(-2)
    one = formats.mxfp8(x)
    assert bool(((one - x).abs() <= x.abs() / 16)[large].all()) and not torch.equal(one, x)
    assert torch.equal(formats.mxfp8(x, 2)[large], x[large])
    by_row = formats.fp8(x)
    assert bool((by_row.abs().amax(-1) <= x.abs().amax(-1) * (1 + 1e-6)).all())
    assert float((by_row - x).norm() / x.norm()) < 0.04
    assert formats.fp8(torch.zeros(2, 32)).abs().max() == 0 and not formats.mxfp8(torch.zeros(2, 32)).any()


def test_powers_of_two() -> None:
    x = torch.tensor([1.0, 1.0000001, 0.75, 2.0**-20, 3.0], dtype=torch.float64)
    assert formats.power_of_two_above(x).tolist() == [1.0, 2.0, 1.0, 2.0**-20, 4.0]


@pytest.mark.parametrize("words", ["fp4", "mxfp4x5", "bf16,bf16,bf16", ""])
def test_what_is_no_format(words: str) -> None:
    with pytest.raises(ValueError, match="expected one of bf16, fp8"):
        formats.named(words)


def test_two_products_may_have_two_formats() -> None:
    x = values()
    chosen = formats.named("mxfp4x1,mxfp4x4")
    assert torch.equal(chosen["gate_up"](x), formats.mxfp4(formats.bf16(x), 1))
    assert torch.equal(chosen["down"](x), formats.mxfp4(x, 4))


def test_a_models_experts_get_their_inputs_in_the_format() -> None:
    model = quality_logits.load_transformers(str(quality.SMALL / "checkpoint"), "float32", experts="mxfp4x1,bf16")
    seen: dict[str, torch.Tensor] = {}
    activations.watch(model, lambda layer, product, x: seen.__setitem__(product, x))
    with torch.no_grad():
        model(torch.tensor([list(range(100, 132))]))
    assert torch.equal(formats.mxfp4(seen["gate_up"], 1), seen["gate_up"])  # another quantization changes nothing
    assert torch.equal(formats.bf16(seen["down"]), seen["down"])


def test_the_program_writes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    options = ["--only", "activations", "layer", "--rows", "4", "--tokens", "16", "--json", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["fp4_terms.py", *options])
    monkeypatch.setattr(fp4_terms, "HIDDEN", 96)
    monkeypatch.setattr(fp4_terms, "LAYER_FORMATS", ["bf16", "mxfp4x4,mxfp4x3"])
    fp4_terms.main()
    assert "Relative error of activations" in capsys.readouterr().out
    activations_table, layer = (json.loads((tmp_path / f"fp4-{name}.json").read_text()) for name in options[1:3])
    assert [row[0] for row in activations_table["rows"]] == list(formats.FORMATS)
    assert layer["columns"][1:] == ["normal", "t(3)", "outliers", "product", "small model", "small model, outliers"]
    for row in layer["rows"]:
        assert len(row) == len(layer["columns"])
        assert all(0.5 < float(cell.split("(")[1].rstrip(")")) < 2 for cell in row[1:])
