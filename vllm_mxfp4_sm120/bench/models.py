# SPDX-License-Identifier: Apache-2.0
"""The layers that are timed: their sizes, random weights and inputs, and what the right answer is."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_mxfp4_sm120 import config_path, mxfp4
from vllm_mxfp4_sm120.checkpoint import AttentionSizes, Sizes, published_config
from vllm_mxfp4_sm120.moe import MoEShape, MoEWeights, reference, topk_softmax

# By model: how many experts layers' weights to walk over, together far larger than any L2 cache. `tiny` is for CPUs,
# configs/tiny.
LAYERS = {"tiny": 2, "20b": 4, "120b": 2}
DENSE = ("qkv", "o", "lm_head")
# Of a linear layer, copies of this many bytes in all, from 2 to 24 (the layers of gpt-oss-20b).
DENSE_BYTES = 700_000_000
# Rows of an answer that are compared with float64: enough to tell, few enough for cards that are slow at it.
SAMPLE = 16


@dataclass(frozen=True)
class Model:
    """One rank's share of a model: the experts layer's sizes, and (rows, K) of each linear layer."""

    name: str
    experts: MoEShape
    dense: dict[str, tuple[int, int]]

    @property
    def layers(self) -> int:
        """Experts layers to walk over."""
        return LAYERS[self.name]


def model(name: str, tensor_parallel: int = 1) -> Model:
    """One of LAYERS, the shard of one of so many ranks. Raises ValueError for sizes that so many ranks don't divide."""
    config = json.loads(config_path("tiny", "config.json").read_text()) if name == "tiny" else None
    config = published_config(f"gpt-oss-{name}") if config is None else config
    shape, attention = Sizes.from_config(config).layer, AttentionSizes.from_config(config)
    blocks = shape.intermediate_size // mxfp4.BLOCK
    for what, size in ((f"blocks of {mxfp4.BLOCK} of the intermediate size", blocks), ("heads", attention.num_heads)):
        if tensor_parallel < 1 or size % tensor_parallel:
            raise ValueError(f"expected ranks that share gpt-oss-{name}'s {size} {what} evenly")
    heads, kv = attention.heads_of_rank(tensor_parallel)
    hidden, dim = shape.hidden_size, attention.head_dim
    return Model(
        name,
        replace(shape, intermediate_size=shape.intermediate_size // tensor_parallel),
        {
            "qkv": ((heads + 2 * kv) * dim, hidden),
            "o": (hidden, heads * dim),
            "lm_head": (attention.padded_vocab_size // tensor_parallel, hidden),
        },
    )


def dense_copies(rows: int, k: int) -> int:
    """Copies of a linear layer's weights to walk over."""
    return max(2, min(24, -(-DENSE_BYTES // (2 * rows * k))))


def random_weights(shape: MoEShape, device: torch.device, seed: int) -> MoEWeights:
    """Random codes and scales 2^-9..2^-6, drawn on the device: there are gigabytes of them."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = MoEWeights.empty(shape, device)
    for codes, scales in ((weights.w13, weights.w13_scale), (weights.w2, weights.w2_scale)):
        codes.random_(0, 256, generator=generator)
        scales.random_(118, 122, generator=generator)
    for bias in (weights.w13_bias, weights.w2_bias):
        if bias is not None:
            bias.normal_(std=0.1, generator=generator)
    return weights


@dataclass(frozen=True)
class Inputs:
    """Of one number of tokens: x bf16 [M, H], and router logits bf16 [M, E] for each layer that is walked over."""

    x: Tensor
    logits: list[Tensor]

    @classmethod
    def random(cls, shape: MoEShape, tokens: int, layers: int, device: torch.device, skew: bool = False) -> Inputs:
        """With `skew`, two of each token's choices are experts 0 and 1."""
        generator = torch.Generator(device).manual_seed(tokens)
        x = torch.randn(tokens, shape.hidden_size, device=device, generator=generator).bfloat16()
        logits = torch.randn(layers, tokens, shape.num_experts, device=device, generator=generator)
        if skew:
            logits[..., :2] += 100.0
        return cls(x, list(logits.bfloat16()))

    def active_experts(self, top_k: int) -> float:
        """Experts that some token chose, on average over the layers."""
        return sum(len(topk_softmax(logits, top_k)[0].unique()) for logits in self.logits) / len(self.logits)


def sample_of(tokens: int, device: torch.device) -> Tensor:
    """The rows that are compared, from the first to the last."""
    return torch.linspace(0, tokens - 1, min(tokens, SAMPLE), device=device).round().long()


class Judge:
    """Compares answers with the right one, in float64: a sample of rows, and every value for being a number."""

    def __init__(self, rows: Tensor, right: Tensor) -> None:
        self.rows, self.right = rows, right

    @classmethod
    def of_experts(cls, weights: MoEWeights, shape: MoEShape, inputs: Inputs) -> Judge:
        """Of the first layer. The activation between the GEMMs is rounded to BF16 as every backend rounds it."""
        rows = sample_of(len(inputs.x), inputs.x.device)
        x, logits = inputs.x[rows], inputs.logits[0][rows]
        routing = topk_softmax(logits, shape.top_k)
        return cls(rows, reference(weights, x, *routing, shape.activation, activation_dtype=torch.bfloat16))

    def relative_error(self, answer: Tensor) -> float:
        """Frobenius; NaN if any value is NaN or infinite, whether it's in the sample or not."""
        if not bool(answer.isfinite().all()):
            return float("nan")
        wrong = answer[self.rows].double()[:, : self.right.shape[1]] - self.right
        return float(wrong.norm() / self.right.norm())
