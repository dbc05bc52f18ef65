# SPDX-License-Identifier: Apache-2.0
"""Who computes an experts layer: this plugin's backends, and vLLM's Marlin and Triton where they can be imported."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional

from vllm_mxfp4_sm120 import selector
from vllm_mxfp4_sm120.backends import registry
from vllm_mxfp4_sm120.backends.base import Backend
from vllm_mxfp4_sm120.fit import LAYOUTS
from vllm_mxfp4_sm120.moe import SWIGLU_ALPHA, SWIGLU_LIMIT, MoEShape, MoEWeights, reference, topk_softmax
from vllm_mxfp4_sm120.platform import Machine

Layer = Callable[[Tensor, Tensor], Tensor]  # (x [M, H], router logits [M, E]) -> [M, H]
Make = Callable[[MoEShape, MoEWeights], Layer]  # raises what says why it can't

REFERENCE = "reference"
VLLM_MARLIN, VLLM_TRITON = "vllm-marlin", "vllm-triton"
# Answers of right kernels are within 6e-3 of float64 (Marlin's); BF16 rounding alone makes 4e-3.
TOLERANCE = Backend.tolerance


def names(machine: Machine) -> tuple[str, ...]:
    """Who is timed unless the user says otherwise: what can serve here by itself, and what it's compared with."""
    if machine.capability is None:
        return ("tiled", "upcast", REFERENCE)
    return (*registry.automatic(machine.family)[:-1], VLLM_MARLIN, VLLM_TRITON)  # the last, tiled, is the slow way out


ALL = (*registry.NAMES, REFERENCE, VLLM_MARLIN, VLLM_TRITON)


def maker(name: str, machine: Machine) -> tuple[Make, bool]:
    """How to make one of ALL, and whether a CUDA graph can hold it."""
    if name == REFERENCE:
        return in_float32, False
    if name in (VLLM_MARLIN, VLLM_TRITON):
        if machine.capability is None:
            raise RuntimeError("vLLM's kernels need an NVIDIA GPU")
        return (vllm_marlin if name == VLLM_MARLIN else vllm_triton), True
    backend = registry.load(name)
    return ours(backend, machine), backend.capturable and machine.capability is not None


def ours(backend: type[Backend], machine: Machine) -> Make:
    """A backend of this plugin, once it has proved itself; the proof of one with kernels runs in a child process."""

    def make(shape: MoEShape, weights: MoEWeights) -> Layer:
        candidate = selector.look_at(backend.name, machine, shape, selector.Request(backend.name))
        if candidate.reason is not None:
            raise RuntimeError(candidate.reason)
        layer = backend(shape)
        prepared = layer.prepare(weights)
        return lambda x, logits: layer.forward_logits(prepared, x, logits)

    return make


def in_float32(shape: MoEShape, weights: MoEWeights) -> Layer:
    """The mathematics as `moe.reference` has it, in float32."""

    def layer(x: Tensor, logits: Tensor) -> Tensor:
        routing = topk_softmax(logits, shape.top_k)
        return reference(weights, x, *routing, shape.activation, dtype=torch.float32).bfloat16()

    return layer


def vllm_marlin(shape: MoEShape, weights: MoEWeights) -> Layer:
    """vLLM's Marlin experts, padded (to 3072 x 2944) as vLLM pads GPT-OSS for them."""
    from vllm.model_executor.layers.fused_moe.activation import ApplyMoEActivationConfig, MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk
    from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import prepare_moe_mxfp4_layer_for_marlin
    from vllm.scalar_type import scalar_types

    assert weights.w13_bias is not None and weights.w2_bias is not None
    layout = next(layout for layout in LAYOUTS if layout.name == "vLLM Marlin")
    hidden, intermediate = layout.sizes(shape.hidden_size, shape.intermediate_size)

    def padded(tensor: Tensor, *sizes: int) -> Tensor:
        out = tensor.new_zeros(shape.num_experts, *sizes)
        out[tuple(slice(0, size) for size in tensor.shape)] = tensor
        return out

    w13, w2, w13_scale, w2_scale, w13_bias, w2_bias = prepare_moe_mxfp4_layer_for_marlin(
        SimpleNamespace(params_dtype=torch.bfloat16),
        padded(weights.w13, 2 * intermediate, hidden // 2),
        padded(weights.w2, hidden, intermediate // 2),
        padded(weights.w13_scale, 2 * intermediate, hidden // 32),
        padded(weights.w2_scale, hidden, intermediate // 32),
        padded(weights.w13_bias, 2 * intermediate),
        padded(weights.w2_bias, hidden),
    )
    activation = ApplyMoEActivationConfig(clamp_limit=SWIGLU_LIMIT, alpha=SWIGLU_ALPHA, beta=1.0)

    def layer(x: Tensor, logits: Tensor) -> Tensor:
        wide = functional.pad(x, (0, hidden - shape.hidden_size))
        gates, ids, *_ = fused_topk(wide, logits, shape.top_k, True)
        out: Tensor = fused_marlin_moe(
            wide, w13, w2, w13_bias, w2_bias, w13_scale, w2_scale, gates, ids,
            quant_type_id=scalar_types.float4_e2m1f.id, global_num_experts=shape.num_experts,
            activation=MoEActivation.SWIGLUOAI, activation_config=activation, moe_sum=None,
        )  # fmt: skip
        return out[:, : shape.hidden_size]

    return layer


def vllm_triton(shape: MoEShape, weights: MoEWeights) -> Layer:
    """vLLM's Triton experts (OpenAI's triton_kernels), what it takes by itself on Hopper."""
    from triton_kernels.matmul_ogs import FlexCtx, PrecisionConfig
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import mxfp4_w4a16_moe_quant_config
    from vllm.model_executor.layers.fused_moe.experts.gpt_oss_triton_kernels_moe import triton_kernel_moe_forward
    from vllm.model_executor.layers.quantization.utils.mxfp4_utils import _swizzle_mxfp4, mx_scale_kwargs
    from vllm.utils.import_utils import has_triton_kernels

    if not has_triton_kernels():
        raise ImportError("triton_kernels is missing")

    def swizzled(codes: Tensor, scales: Tensor) -> tuple[Tensor, object]:
        matrix, flex, scale = _swizzle_mxfp4(codes.contiguous(), scales.contiguous())
        return matrix, PrecisionConfig(**mx_scale_kwargs(scale), flex_ctx=FlexCtx(rhs_data=flex))

    assert weights.w13_bias is not None and weights.w2_bias is not None
    w13, w13_precision = swizzled(weights.w13, weights.w13_scale)
    w2, w2_precision = swizzled(weights.w2, weights.w2_scale)
    config = mxfp4_w4a16_moe_quant_config(
        w1_scale=w13_precision, w2_scale=w2_precision,
        w1_bias=weights.w13_bias.float(), w2_bias=weights.w2_bias.float(),
        gemm1_alpha=SWIGLU_ALPHA, gemm1_beta=1.0, gemm1_clamp_limit=SWIGLU_LIMIT,
    )  # fmt: skip

    def layer(x: Tensor, logits: Tensor) -> Tensor:
        out: Tensor = triton_kernel_moe_forward(
            x, w13, w2, logits, shape.top_k, True,
            activation=MoEActivation.SWIGLUOAI, quant_config=config, global_num_experts=shape.num_experts,
        )  # fmt: skip
        return out

    return layer
