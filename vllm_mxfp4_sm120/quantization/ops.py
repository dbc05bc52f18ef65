# SPDX-License-Identifier: Apache-2.0
"""The experts as operators of torch, for models that vLLM compiles whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_mxfp4_sm120.quantization.vllm_symbols import RoutedExperts, get_forward_context

if TYPE_CHECKING:
    from vllm_mxfp4_sm120.quantization.fused_moe import Mxfp4Sm120MoEMethod

# vLLM's compiled CPU model traces into the layer, where a backend's choices depend on data; these two operators are the
# wall. On GPUs vLLM has its own around the whole layer, and these are not called.


def _method(layer_name: str) -> tuple[Mxfp4Sm120MoEMethod, RoutedExperts]:
    layer = get_forward_context().no_compile_layers[layer_name].routed_experts
    return layer.quant_method, layer


@torch.library.custom_op("mxfp4_sm120::moe_logits", mutates_args=())
def moe_logits(x: Tensor, router_logits: Tensor, layer_name: str) -> Tensor:
    method, layer = _method(layer_name)
    return method.apply_monolithic(layer, x, router_logits)


@torch.library.custom_op("mxfp4_sm120::moe_routed", mutates_args=())
def moe_routed(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, layer_name: str) -> Tensor:
    method, layer = _method(layer_name)
    return method.apply(layer, x, topk_weights, topk_ids, None, None)


@moe_logits.register_fake
def _(x: Tensor, router_logits: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(x)


@moe_routed.register_fake
def _(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(x)
