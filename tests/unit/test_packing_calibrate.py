# SPDX-License-Identifier: Apache-2.0
"""Second moments of what goes into the experts, against hooks in transformers' own model."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from vllm_mxfp4_sm120.cli.__main__ import main
from vllm_mxfp4_sm120.packing import calibrate
from vllm_mxfp4_sm120.packing.calibrate import second_moments
from vllm_mxfp4_sm120.packing.source import Source

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = Path(__file__).parents[2] / "models" / "gpt-oss-small"
TEXT = (SMALL / "heldout.txt").read_text()[:2000]


def test_moments_are_those_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of 150 tokens, more than twice the sliding window."""
    from transformers import AutoTokenizer, GptOssForCausalLM, Mxfp4Config

    monkeypatch.setattr(calibrate, "ROW", 150)
    monkeypatch.setattr(calibrate, "ROWS", 2)
    checkpoint = SMALL / "checkpoint"
    found = second_moments(Source(checkpoint), TEXT, torch.device("cpu"))
    options = {"quantization_config": Mxfp4Config(dequantize=True), "attn_implementation": "eager"}
    model = GptOssForCausalLM.from_pretrained(checkpoint, **options).float().eval()
    model.config._experts_implementation = "eager"
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))

    def hook(layer: int):
        def add(module, args, kwargs, output):
            x, ids = args[0].flatten(0, -2), kwargs["router_indices"] if "router_indices" in kwargs else args[1]
            name = f"model.layers.{layer}.mlp.experts.gate_up_proj"
            sums.setdefault(name, torch.zeros(16, x.shape[-1]))
            down = f"model.layers.{layer}.mlp.experts.down_proj"
            sums.setdefault(down, torch.zeros(16, 96))
            for expert in range(16):
                chosen = x[(ids == expert).any(-1)]
                sums[name][expert] += chosen.square().sum(0)
                inner = module._apply_gate(chosen @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert])
                sums[down][expert] += inner.square().sum(0)
                counts[name][expert] += len(chosen)
                counts[down][expert] += len(chosen)

        return add

    for layer, block in enumerate(model.model.layers):
        block.mlp.experts.register_forward_hook(hook(layer), with_kwargs=True)
    ids = torch.tensor(AutoTokenizer.from_pretrained(checkpoint)(TEXT).input_ids[:300]).view(2, 150)
    with torch.no_grad():
        model(ids)
    assert found.keys() == sums.keys()
    for name, total in sums.items():
        count = torch.tensor([[counts[name][expert]] for expert in range(16)])
        used = count[:, 0] > 0
        torch.testing.assert_close(found[name][used], (total / count)[used], rtol=2e-3, atol=1e-5)
        if not used.all():
            torch.testing.assert_close(found[name][~used][0], found[name][used].mean(0))


def test_the_command_calibrates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vllm_mxfp4_sm120 import packing

    packing.unpack(SMALL / "checkpoint", tmp_path / "bf16")
    (tmp_path / "text").write_text(TEXT)
    arguments = ["pack", str(tmp_path / "bf16"), str(tmp_path / "packed"), "--calibrate", str(tmp_path / "text")]
    assert main(arguments) == 2
    assert "give --search, too" in capsys.readouterr().err
    assert main([*arguments, "--search", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {each["relative_rms"] for each in report["projections"]} == {0.0}  # exact before, exact after
    for damage, line in (
        (b"", "is empty"),
        (b"\x97", "--calibrate " + str(tmp_path / "text") + " is no text in UTF-8"),
    ):
        (tmp_path / "text").write_bytes(damage)
        assert main([*arguments, "--search"]) == 1
        assert line in capsys.readouterr().err
