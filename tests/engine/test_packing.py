# SPDX-License-Identifier: Apache-2.0
"""A fine-tune of the small trained model, packed and served by this plugin, answers as its BF16 does in vLLM."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

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


@pytest.fixture(scope="module")
def packed(tuned: Path) -> Path:
    directory = tuned.with_name("packed")
    report = packing.pack(tuned, directory, packing.Options(search=True))
    assert 0 < max(each.relative_rms for each in report.projections) < 0.01
    return directory


@pytest.fixture(scope="module")
def prompts(tuned: Path) -> list[list[int]]:
    text = (SMALL / "heldout.txt").read_text()
    tokenizer = Tokenizer.from_file(str(tuned / "tokenizer.json"))
    return [tokenizer.encode(text[start : start + 200]).ids for start in range(0, 8000, 1000)]


def differences(one: list[float], other: list[float]) -> Tensor:
    """Of the log-probability of each token of the prompts, signed; pytest -rP shows how large they are."""
    difference = torch.tensor(one) - torch.tensor(other)
    size = difference.abs()
    quantiles = ", ".join(f"{q:.0%} below {size.quantile(q):.4f}" for q in (0.5, 0.95, 0.99, 1.0))
    print(f"{len(size)} tokens: mean {size.mean():.4f}, {quantiles}; loss {difference.mean():+.5f}")
    return difference


def test_packing_alone_costs_little(tuned: Path, packed: Path, prompts: list[list[int]]) -> None:
    """In transformers' float32, where nothing else is rounded. Where two experts are as good, a hair may decide."""
    from transformers import GptOssForCausalLM, Mxfp4Config

    def scores(directory: Path, **options: object) -> list[float]:
        model = GptOssForCausalLM.from_pretrained(directory, attn_implementation="eager", **options).float()
        found: list[float] = []
        for ids in prompts:
            with torch.no_grad():
                steps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            found += steps.gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()
        return found

    found = scores(packed, quantization_config=Mxfp4Config(dequantize=True))
    difference = differences(found, scores(tuned))
    assert difference.abs().mean() < TOLERANCE / 4 and difference.abs().quantile(0.95) < TOLERANCE


def test_a_packed_fine_tune_answers_as_its_bf16(
    tuned: Path, packed: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    """In vLLM, whose BF16 experts round otherwise than this plugin: single tokens differ by what rounding does."""
    engine = {"score": True, "enforce_eager": True, "max_num_seqs": len(prompts)}
    bf16 = generate(tuned, prompts, tmp_path, **engine)
    ours = generate(packed, prompts, tmp_path, quantization="mxfp4_sm120", **engine)
    assert (bf16.quantization, ours.quantization) == (None, "mxfp4_sm120")
    difference = differences(list(chain(*ours.scores)), list(chain(*bf16.scores)))
    assert difference.abs().median() < TOLERANCE and difference.mean().abs() < TOLERANCE / 4
