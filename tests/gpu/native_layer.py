# SPDX-License-Identifier: Apache-2.0
"""The native backend on a GPU with its weights, and the answers that it should give."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support import layers
from vllm_mxfp4_sm120.backends.native import Native
from vllm_mxfp4_sm120.moe import MoEShape, MoEWeights, reference, topk_softmax
from vllm_mxfp4_sm120.platform import Machine

# Against a reference that rounds the activation between the GEMMs to BF16 as the kernels do; the output's own rounding
# makes 1.65e-3. (Against one that rounds nothing the two roundings make 2.33e-3.)
TOLERANCE = 2.0e-3


def why_not() -> str | None:
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU"
    return Native.why_not(Machine.here(), MoEShape(8, 8, 64, 64, 2))


def real_weights(shape: MoEShape) -> MoEWeights:
    """With scales as published checkpoints have them."""
    return layers.random_weights(shape, "cuda", scales=layers.REAL_SCALES)


def inputs(shape: MoEShape, tokens: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    return layers.random_inputs(shape, tokens, "cuda", seed)


def error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


class Layer:
    """A backend with its weights, and the answers it should give."""

    def __init__(self, shape: MoEShape, weights: MoEWeights | None = None) -> None:
        self.shape, self.weights = shape, weights or real_weights(shape)
        self.backend = Native(shape)
        self.prepared = self.backend.prepare(self.weights.clone())

    def __call__(self, x: Tensor, logits: Tensor) -> Tensor:
        return self.backend.forward_logits(self.prepared, x, logits)

    def expected(self, x: Tensor, logits: Tensor) -> Tensor:
        ids, gates = topk_softmax(logits, self.shape.top_k)
        return reference(self.weights, x, ids, gates, self.shape.activation, activation_dtype=torch.bfloat16)

    def check(self, x: Tensor, logits: Tensor) -> None:
        out = self(x, logits)
        assert out.shape == x.shape and out.dtype == torch.bfloat16
        # A few dozen outputs are no average: there one activation that rounds to the other neighbour shows.
        assert error(out, self.expected(x, logits)) <= (TOLERANCE if out.numel() >= 1000 else 2.6e-3)


def run_op(layer: Layer, x: Tensor, logits: Tensor, **changes) -> Tensor:
    return torch.ops.mxfp4_sm120.moe_layer(**{**op_arguments(layer, x, logits), **changes})


def op_arguments(layer: Layer, x: Tensor, logits: Tensor) -> dict:
    return {
        "x": x,
        "w13": layer.prepared["w13"],
        "w2": layer.prepared["w2"],
        "w13_bias": layer.prepared.get("w13_bias"),
        "w2_bias": layer.prepared.get("w2_bias"),
        "router_logits": logits,
        "topk_ids": None,
        "topk_weights": None,
        "expert_map": None,
        "num_experts": layer.shape.num_experts,
        "top_k": layer.shape.top_k,
        "swiglu_oai": True,
        "config": -1,
    }
