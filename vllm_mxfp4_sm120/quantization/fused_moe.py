"""The FusedMoE method: loads packed experts, hands them to one backend, and calls it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig, RoutingMethodType
from vllm.model_executor.utils import set_weight_attrs

from vllm_mxfp4_sm120 import mxfp4, selector
from vllm_mxfp4_sm120.backends.base import Backend
from vllm_mxfp4_sm120.checkpoint import check_scales
from vllm_mxfp4_sm120.memory import reused_blocks
from vllm_mxfp4_sm120.moe import Activation, MoEShape, MoEWeights
from vllm_mxfp4_sm120.platform import Machine

logger = init_logger("vllm.mxfp4_sm120")

ACTIVATIONS = {MoEActivation.SWIGLUOAI: Activation.SWIGLU_OAI, MoEActivation.SILU: Activation.SILU}
# Both normalise over the chosen experts only, which is what `forward_logits` computes.
ROUTED_BY_BACKEND = (RoutingMethodType.Renormalize, RoutingMethodType.RenormalizeNaive)
# vLLM's names for the loaded tensors, as GPT-OSS's loader looks for them -> the fields of MoEWeights.
LOADED = {
    "w13_weight": "w13",
    "w13_weight_scale": "w13_scale",
    "w13_bias": "w13_bias",
    "w2_weight": "w2",
    "w2_weight_scale": "w2_scale",
    "w2_bias": "w2_bias",
}


class Mxfp4Sm120MoEMethod(FusedMoEMethodBase):
    """One layer's experts: `backend` computes, `prepared` holds its tensors.

    `routes` says whether the backend takes router logits; else vLLM's router chooses the experts.
    """

    # GPT-OSS's loader asks this whether the experts are packed.
    weight_dtype = "mxfp4"

    backend: Backend
    prepared: dict[str, Tensor]

    def __init__(self, moe: FusedMoEConfig) -> None:
        super().__init__(moe)
        # vLLM's own router is needed to return the routing to the user, for any routing but GPT-OSS's, and where vLLM
        # (from 0.33 on) changes routes between router and experts.
        returned = get_current_vllm_config().aux_output_config.enable_return_routed_experts
        changed = getattr(moe, "require_decomposed_backend", False)
        self.routes = moe.routing_method in ROUTED_BY_BACKEND and not returned and not changed

    @property
    def is_monolithic(self) -> bool:
        """vLLM's name for `routes`."""
        return self.routes

    def maybe_roundup_sizes(
        self,
        hidden_size: int,
        intermediate_size_per_partition: int,
        act_dtype: torch.dtype,
        moe_parallel_config: FusedMoEParallelConfig,
    ) -> tuple[int, int]:
        """Nothing is padded, but a shard ends where a block of 32 does (the loader cuts there)."""
        blocks = -(-intermediate_size_per_partition // mxfp4.BLOCK)
        return hidden_size, blocks * mxfp4.BLOCK

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the checkpoint's layout as parameters to load into, and choose the backend. Raises ValueError."""
        shape = MoEShape(
            num_experts=self.moe.num_experts,
            local_experts=num_experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size_per_partition,
            top_k=self.moe.experts_per_token,
            has_bias=self.moe.has_bias,
            activation=ACTIVATIONS[self.moe.activation],
        )
        request = selector.Request.from_user(self.moe.moe_backend, get_current_vllm_config().additional_config)
        choice = selector.select(Machine.here(), shape, request)
        logger.info_once("mxfp4_sm120: %s", choice)
        self.backend = choice.backend(shape)
        never_capture_unless(self.backend)
        weights = MoEWeights.empty(shape, torch.get_default_device())
        for name, field in LOADED.items():
            tensor = getattr(weights, field)
            if tensor is not None:
                parameter = torch.nn.Parameter(tensor, requires_grad=False)
                set_weight_attrs(parameter, {**extra_weight_attrs, "weight_loader": Loader(layer)})
                layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Give the loaded tensors to the backend and keep only what it made of them."""
        weights = MoEWeights(
            **{field: getattr(layer, name).data for name, field in LOADED.items() if hasattr(layer, name)}
        )
        for name, scales in (("gate_up_proj_scales", weights.w13_scale), ("down_proj_scales", weights.w2_scale)):
            check_scales(f"{layer.layer_name}.{name}", scales)
        for name in LOADED:
            if hasattr(layer, name):
                delattr(layer, name)
        with reused_blocks():
            prepared = self.backend.prepare(weights)
        self.prepared = {}
        for name, tensor in prepared.items():
            self.prepared[name] = torch.nn.Parameter(tensor, requires_grad=False)
            layer.register_parameter(f"packed_{name}", self.prepared[name])

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """None: this method computes the layer itself, without vLLM's modular kernels."""

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        if torch.compiler.is_compiling():
            return moe_routed(x, topk_ids, topk_weights, layer.layer_name)
        return self.backend.forward(self.prepared, x, topk_ids, topk_weights, layer.expert_map)

    def apply_monolithic(
        self, layer: RoutedExperts, x: Tensor, router_logits: Tensor, input_ids: Tensor | None = None
    ) -> Tensor:
        if torch.compiler.is_compiling():
            return moe_logits(x, router_logits, layer.layer_name)
        return self.backend.forward_logits(self.prepared, x, router_logits, layer.expert_map)


class Loader:
    """Copies one tensor of the checkpoint, this rank's part of it, into its parameter. Raises ValueError.

    vLLM calls it with all local experts of a stacked tensor, or with one expert (`shard_id`, `expert_id`).
    """

    def __init__(self, layer: RoutedExperts) -> None:
        self.layer = layer

    def __call__(
        self,
        param: torch.nn.Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str | None,
        expert_id: int | None,
        return_success: bool = False,
    ) -> bool | None:
        if expert_id is not None:
            return self.layer.weight_loader(
                param, loaded_weight, weight_name, shard_id, expert_id, return_success=return_success
            )
        target = param.data
        # The last rank's shard may be shorter than the others': what lies behind it stays zero and adds nothing.
        fits = all(have <= room for have, room in zip(loaded_weight.shape, target.shape, strict=True))
        if loaded_weight.dtype != target.dtype or not fits:
            raise ValueError(
                f"{weight_name}: got {loaded_weight.dtype} {list(loaded_weight.shape)} for this rank, expected at most "
                f"{target.dtype} {list(target.shape)}; the checkpoint does not match its config.json, fetch it again"
            )
        # Expert by expert: all of them aren't contiguous (MoEWeights.empty), and torch copies to what isn't through a
        # second tensor on the GPU, 1 GiB for a 120b layer.
        for expert, loaded in zip(target, loaded_weight, strict=False):
            expert[tuple(slice(size) for size in loaded.shape)].copy_(loaded)
        return True if return_success else None


def never_capture_unless(backend: Backend) -> None:
    """Turn CUDA graphs off, before the engine captures any, where the backend can't run inside one."""
    compilation = get_current_vllm_config().compilation_config
    if backend.capturable or not compilation.cudagraph_mode:
        return
    logger.warning_once(
        "mxfp4_sm120: CUDA graphs are off, because the %s backend can't be captured in one", backend.name
    )
    compilation.cudagraph_mode = CUDAGraphMode.NONE


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
