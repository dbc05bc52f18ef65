"""GPT-OSS's router: for few tokens one short kernel, in place of a GEMM and its split-K sum."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from vllm_mxfp4_sm120.backends import native
from vllm_mxfp4_sm120.plugin import NAME

logger = init_logger("vllm.mxfp4_sm120")


class RouterMethod(UnquantizedLinearMethod):
    """`fused` says whether the native library computes the logits: where it also computes the experts behind them."""

    fused = False

    def __init__(self, layers: dict[str, Any]) -> None:
        super().__init__()
        self.layers = layers  # by name; the experts are made after their router

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)
        experts = self.layers.get(layer.prefix.removesuffix("router") + "experts")
        backend = getattr(getattr(experts, "routed_experts", None), "quant_method", None)
        if not isinstance(getattr(backend, "backend", None), native.Native):
            return
        reason = native.router_why_not(layer.weight, layer.bias)
        self.fused = reason is None
        if reason is not None:
            logger.warning_once("mxfp4_sm120: the router stays with vLLM: %s", reason)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return native.router_logits(x, layer.weight, bias) if self.fused else super().apply(layer, x, bias)


class RouterLinear(GateLinear):
    """vLLM's, with our method where the model is ours."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        ours = config.quant_config is not None and config.quant_config.get_name() == NAME
        if ours and type(self.quant_method) is UnquantizedLinearMethod:
            self.quant_method: Any = RouterMethod(config.compilation_config.static_forward_context)


def register() -> None:
    """By vLLM's own way to replace a layer, unless another plugin has taken it."""
    if GateLinear.__name__ not in op_registry_oot:
        GateLinear.register_oot(RouterLinear)
