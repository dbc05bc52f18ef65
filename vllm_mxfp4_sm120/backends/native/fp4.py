# SPDX-License-Identifier: Apache-2.0
"""A MoE layer on the FP4 tensor cores of SM 12.x, activations as FP4 terms. Not run there yet: nothing selects it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vllm_mxfp4_sm120.backends.base import Prepared
from vllm_mxfp4_sm120.backends.native import library
from vllm_mxfp4_sm120.moe import Activation, MoEShape


@dataclass(frozen=True)
class Configuration:
    """One entry of the library's table of FP4 kernels; an entry's place is the op's `config`."""

    name: str
    terms: int  # FP4 numbers whose sum an activation is
    tokens: int  # of a token block
    threads: int
    shared_bytes: int


@lru_cache
def configurations() -> tuple[Configuration, ...]:
    """Empty where the library has no FP4 kernels. The library must be loaded."""
    return tuple(Configuration(*entry) for entry in zip(*torch.ops.mxfp4_sm120.fp4_configurations(), strict=True))


def why_not(capability: tuple[int, int] | None) -> str | None:
    """Why a GPU can't run the FP4 kernels of the loaded library, in one line; None if it can."""
    built = torch.ops.mxfp4_sm120.fp4_architectures()
    if not built:
        return "the CUDA library has no FP4 kernels: they take nvcc 12.8 or newer, and a build for SM 12.x"
    if capability is None:
        return "it needs an NVIDIA GPU"
    if not library.covers(built, capability):
        return f"the FP4 kernels are built for {built}, not for sm_{capability[0]}{capability[1]}"
    return None


def forward(
    shape: MoEShape,
    prepared: Prepared,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    config: int,
    expert_map: Tensor | None = None,
) -> Tensor:
    """The layer's output bf16 [M, H], from what `Native.prepare` made of the weights.

    x bf16 [M, H], topk_ids int32 [M, k], topk_weights float32 [M, k], expert_map int32 [num_experts]. Raises
    RuntimeError where the kernels can't run, and for other arguments.
    """
    out: Tensor = torch.ops.mxfp4_sm120.fp4_moe_layer(
        x,
        prepared["w13"],
        prepared["w2"],
        prepared.get("w13_bias"),
        prepared.get("w2_bias"),
        None,
        topk_ids,
        topk_weights,
        expert_map,
        shape.num_experts,
        shape.top_k,
        shape.activation is Activation.SWIGLU_OAI,
        config,
    )
    return out
