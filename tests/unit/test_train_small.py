# SPDX-License-Identifier: Apache-2.0
"""models/gpt-oss-small: its training script, beside transformers, and what its card says of the checkpoint."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM, Mxfp4Config
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from vllm_mxfp4_sm120 import mxfp4
from vllm_mxfp4_sm120.checkpoint import Checkpoint

SMALL = Path(__file__).parents[2] / "models" / "gpt-oss-small"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def train() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_small", SMALL / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass looks while it is made
    spec.loader.exec_module(module)
    return module


def packed(weight: torch.Tensor) -> torch.Tensor:
    """[E, K, N] as the package packs and unpacks it, along K."""
    return mxfp4.dequantize(*mxfp4.quantize(weight.transpose(1, 2)), weight.dtype).transpose(1, 2)


def test_experts_are_seen_as_the_package_packs_them(train: ModuleType) -> None:
    """And gradients pass as if they weren't."""
    weight = torch.randn(3, 64, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    seen = train.through_mxfp4(weight)
    torch.testing.assert_close(seen, packed(weight.detach()), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(seen, weight, atol=1e-2)
    slope = torch.randn(3, 64, 5)
    (seen * slope).sum().backward()
    assert torch.equal(weight.grad, slope)


def test_all_experts_at_once_are_transformers_loop(train: ModuleType) -> None:
    """In float64, on packed weights: the outputs, and the gradients of everything."""
    torch.manual_seed(0)
    config = GptOssConfig(hidden_size=64, intermediate_size=32, num_local_experts=8, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    ours, theirs = GptOssExperts(config).double(), GptOssExperts(config).double()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter)  # large enough for the clamps
    theirs.load_state_dict(ours.state_dict())
    for weight in (theirs.gate_up_proj, theirs.down_proj):
        weight.data = packed(weight.data)
    x, slope = torch.randn(2, 50, 64, dtype=torch.float64)
    weights, ids = torch.randn(50, 8, dtype=torch.float64).softmax(-1).topk(2)
    outputs = []
    for experts, compute in ((ours, train.all_experts), (theirs, GptOssExperts.forward)):
        given, gates = x.clone().requires_grad_(), weights.clone().requires_grad_()
        out = compute(experts, given, ids, gates)
        (out * slope).sum().backward()
        outputs.append([out, given.grad, gates.grad, *(parameter.grad for parameter in experts.parameters())])
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other)


def test_a_short_training_leaves_a_checkpoint_that_is_the_model(train: ModuleType, tmp_path: Path) -> None:
    """Two steps: the package opens what is written, and transformers computes from it what was trained."""
    tokens = np.random.default_rng(0).integers(4, 2560, 400, dtype=np.uint16)
    corpus, output = tmp_path / "corpus", tmp_path / "output"
    corpus.mkdir(), output.mkdir()
    for name in ("train", "heldout"):
        np.save(corpus / f"{name}.npy", tokens)
    (corpus / "tokenizer.json").write_bytes((SMALL / "checkpoint" / "tokenizer.json").read_bytes())
    recipe = train.Recipe(length=32, sequences=2, steps=2, warmup=1, evaluate_every=1)
    model = train.train(corpus, output, recipe, 600, "cpu").eval()

    log = json.loads((output / "training.json").read_text())
    assert [row["step"] for row in log["evaluations"]] == [1, 2]
    assert log["evaluations"][1]["heldout"] < log["evaluations"][0]["heldout"]
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint", "training.json"]
    Checkpoint(output / "checkpoint").read_layer(5)
    how = {"quantization_config": Mxfp4Config(dequantize=True), "attn_implementation": "eager"}
    read = GptOssForCausalLM.from_pretrained(output / "checkpoint", **how).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 3:  # what isn't packed is written in BF16
                parameter.copy_(parameter.bfloat16().float())
        ids = torch.from_numpy(tokens[None, :60].astype(np.int64))
        torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_card_is_of_this_checkpoint() -> None:
    card, log = (SMALL / "README.md").read_text(), json.loads((SMALL / "training.json").read_text())
    weights = sum(path.stat().st_size for path in (SMALL / "checkpoint").glob("*.safetensors"))
    assert weights <= 8_000_000 and f"{weights:,} bytes of weights" in card
    assert f"{log['parameters']:,} parameters" in card
    assert f"held-out loss {log['evaluations'][-1]['heldout']:.3f} nats" in card
    sizes = Checkpoint(SMALL / "checkpoint").sizes
    assert (sizes.num_layers, sizes.num_experts, sizes.top_k) == (6, 16, 4)
    for title in ("Greedy", "Sampled"):
        section = re.search(rf"### {title}.*?\n\n(.*?)(?:\n\n|\Z)", card, re.DOTALL)
        assert section is not None
        assert len(section[1].strip().splitlines()) == 10
