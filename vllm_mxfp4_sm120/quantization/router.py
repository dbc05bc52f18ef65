# SPDX-License-Identifier: Apache-2.0
"""GPT-OSS's router: for few tokens one short kernel, in place of a GEMM and its split-K sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_mxfp4_sm120 import NAME
from vllm_mxfp4_sm120.backends.base import Backend
from vllm_mxfp4_sm120.quantization.reload import LinearMethod, keeps_weight
from vllm_mxfp4_sm120.quantization.vllm_symbols import (
    GateLinear,
    UnquantizedLinearMethod,
    envs,
    get_current_vllm_config,
    get_forward_context,
    op_registry_oot,
)


class RouterMethod(LinearMethod):
    """The router's logits by the backend of the experts behind it.

    `backend` is None where that brings no kernel for both: then vLLM's linear answers.
    """

    backend: Backend | None = None

    def __init__(self, layers: dict[str, Any]) -> None:
        super().__init__()
        self.layers = layers  # by name; the experts are made after their router

    def process_weights_after_loading(self, layer: Any) -> None:
        if keeps_weight(layer, self.model_config):
            return
        experts = self.layers.get(layer.prefix.removesuffix("router") + "experts")
        backend = getattr(getattr(getattr(experts, "routed_experts", None), "quant_method", None), "backend", None)
        # Its kernel is for few tokens: where batches must not change an answer, vLLM's linear has a kernel for all.
        fused = backend is not None and backend.has_router and not envs.VLLM_BATCH_INVARIANT
        if fused and layer.weight.dtype == torch.bfloat16:
            self.backend = backend
        else:  # vLLM may pack the weights for its own linear layer, and drop them
            super().process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if torch.compiler.is_compiling():
            return router_logits(x, layer.output_size, layer.prefix)
        if self.backend is None:
            return super().apply(layer, x, bias)
        return self.backend.router_logits(x, layer.weight, bias)


# The wall before a compiled model, which vLLM keeps for later starts: another backend may answer then.
@torch.library.custom_op("mxfp4_sm120::router_of_layer", mutates_args=())
def router_logits(x: Tensor, num_experts: int, layer_name: str) -> Tensor:
    layer = get_forward_context().no_compile_layers[layer_name]
    return layer.quant_method.apply(layer, x, layer.bias)


@router_logits.register_fake
def _(x: Tensor, num_experts: int, layer_name: str) -> Tensor:
    return x.new_empty(x.shape[0], num_experts)


class RouterLinear(GateLinear):
    """vLLM's, with our method where the model is ours."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        ours = config.quant_config is not None and config.quant_config.get_name() == NAME
        if ours and type(self.quant_method) is UnquantizedLinearMethod:
            layers = config.compilation_config.static_forward_context
            self.quant_method: Any = RouterMethod(layers)
            layers[self.prefix] = self


def register() -> None:
    """By vLLM's own way to replace a layer, unless another plugin has taken it."""
    if GateLinear.__name__ not in op_registry_oot:
        GateLinear.register_oot(RouterLinear)
