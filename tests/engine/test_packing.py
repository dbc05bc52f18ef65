# SPDX-License-Identifier: Apache-2.0
"""A fine-tune of the small trained model, packed and served by this plugin, answers as its BF16 does in vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests.engine.conftest import generate
from tests.support.checkpoints import SHARD
from vllm_mxfp4_sm120 import packing

SMALL = Path(__file__).parents[2] / "models" / "gpt-oss-small"
TOLERANCE = 2e-2  # of a log-probability
# Of a tensor's standard deviation. Fine-tuning moves an expert's weights by about as much as BF16 resolves, and the
# rest, which isn't rounded to four bits, may move further.
MOVED, MOVED_EXPERTS = 1e-2, 1e-3


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tuned") / "bf16"
    packing.unpack(SMALL / "checkpoint", directory)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in load_file(directory / SHARD).items():
        step = (MOVED_EXPERTS if ".experts." in name else MOVED) * tensor.float().std()
        tensors[name] = (tensor.float() + step * torch.randn(tensor.shape, generator=generator)).bfloat16()
    save_file(tensors, directory / SHARD, metadata={"format": "pt"})
    return directory


def test_a_packed_fine_tune_answers_as_its_bf16(tuned: Path, tmp_path: Path) -> None:
    report = packing.pack(tuned, tmp_path / "packed", packing.Options(search=True))
    assert 0 < max(each.relative_rms for each in report.projections) < 0.01
    text = (SMALL / "heldout.txt").read_text()
    tokenizer = Tokenizer.from_file(str(tuned / "tokenizer.json"))
    prompts = [tokenizer.encode(text[start : start + 200]).ids for start in range(0, 8000, 1000)]
    bf16 = generate(tuned, prompts, tmp_path, enforce_eager=True)
    packed = generate(tmp_path / "packed", prompts, tmp_path, quantization="mxfp4_sm120", enforce_eager=True)
    assert (bf16.quantization, packed.quantization) == (None, "mxfp4_sm120")
    assert packed.worst_difference(bf16) < TOLERANCE
