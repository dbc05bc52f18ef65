# SPDX-License-Identifier: Apache-2.0
"""`dense: bf16`: vLLM's own parameters, loaded, sharded and reloaded as vLLM does; only their product is ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vllm_mxfp4_sm120.dense.linear import is_served, linear
from vllm_mxfp4_sm120.quantization.reload import LinearMethod, keeps_weight
from vllm_mxfp4_sm120.quantization.vllm_symbols import UnquantizedEmbeddingMethod, current_platform


class Bf16Method(LinearMethod):
    """Of a projection."""

    ours = False

    def create_weights(self, layer: Any, *sizes: Any, **options: Any) -> None:
        super().create_weights(layer, *sizes, **options)
        self.ours = is_ours(layer.weight)

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.ours:
            keeps_weight(layer, self.model_config)
        else:
            super().process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = linear(x, layer.weight, None, bias) if self.ours else super().apply(layer, x, bias)
        return out


class Bf16Vocabulary(UnquantizedEmbeddingMethod):
    """Of lm_head. `layer` has its weight by then, be it the embedding's, too."""

    def __init__(self, layer: Any) -> None:
        self.ours = is_ours(layer.weight)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = linear(x, layer.weight, None, bias) if self.ours else super().apply(layer, x, bias)
        return out


def is_ours(weight: Tensor) -> bool:
    """Whether the operator computes a layer. On a GPU always: which kernel it calls may change from start to start.

    On a CPU vLLM packs weights for a linear layer of its own.
    """
    rows, columns = weight.shape
    return not current_platform.is_cpu() or is_served(rows, columns, int8=False)
