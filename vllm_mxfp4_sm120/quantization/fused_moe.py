# SPDX-License-Identifier: Apache-2.0
"""The FusedMoE method: makes parameters to load into, hands what was loaded to one backend, and calls it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_mxfp4_sm120 import mxfp4, selector
from vllm_mxfp4_sm120.backends.base import Backend
from vllm_mxfp4_sm120.memory import reused_blocks
from vllm_mxfp4_sm120.moe import Activation, MoEShape, MoEWeights
from vllm_mxfp4_sm120.quantization import ops, reload
from vllm_mxfp4_sm120.quantization.loader import PARAMETERS, Loader, Shard, parameters
from vllm_mxfp4_sm120.quantization.vllm_symbols import (
    CUDAGraphMode,
    FusedMoEConfig,
    FusedMoEMethodBase,
    FusedMoEParallelConfig,
    MoEActivation,
    RoutedExperts,
    RoutingMethodType,
    envs,
    get_current_vllm_config,
    logger,
)

ACTIVATIONS = {MoEActivation.SWIGLUOAI: Activation.SWIGLU_OAI, MoEActivation.SILU: Activation.SILU}
# Both normalise over the chosen experts only, which is what `forward_logits` computes.
ROUTED_BY_BACKEND = (RoutingMethodType.Renormalize, RoutingMethodType.RenormalizeNaive)


class Mxfp4Sm120MoEMethod(FusedMoEMethodBase):
    """One layer's experts: `backend` computes, `prepared` holds its tensors.

    `routes` says whether the backend takes router logits; else vLLM's router chooses the experts.
    """

    # GPT-OSS's loader asks this whether the experts are packed.
    weight_dtype = "mxfp4"

    backend: Backend
    shape: MoEShape
    loader: Loader

    def __init__(self, moe: FusedMoEConfig) -> None:
        super().__init__(moe)
        config = get_current_vllm_config()
        # vLLM's own router is needed to return the routing to the user, for any routing but GPT-OSS's, and where vLLM
        # (from 0.33 on) changes routes between router and experts.
        returned = config.aux_output_config.enable_return_routed_experts
        changed = getattr(moe, "require_decomposed_backend", False)
        self.routes = moe.routing_method in ROUTED_BY_BACKEND and not returned and not changed
        self.compilation_config, self.model_config = config.compilation_config, config.model_config
        # Then weights come later, from a trainer, or never.
        self.invented = config.load_config.load_format == "dummy"
        self.prepared: dict[str, Tensor] = {}

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
        self.shape = MoEShape(
            num_experts=self.moe.num_experts,
            local_experts=num_experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size_per_partition,
            top_k=self.moe.experts_per_token,
            has_bias=self.moe.has_bias,
            activation=ACTIVATIONS[self.moe.activation],
        )
        options = get_current_vllm_config().additional_config
        self.request = selector.Request.from_user(self.moe.moe_backend, options, envs.VLLM_BATCH_INVARIANT)
        rank = self.moe.moe_parallel_config.tp_rank
        shard = Shard.of(
            layer.expert_map,
            self.moe.num_experts,
            self.moe.intermediate_size,
            intermediate_size_per_partition,
            rank,
        )
        self.loader = Loader(layer.layer_name, self.shape, shard)
        self.choose(selector.select(selector.this_machine(), self.shape, self.request))
        self.stage(layer, torch.get_default_device())

    def choose(self, choice: selector.Choice) -> None:
        logger.info_once("mxfp4_sm120: %s", str(choice))
        if choice.tells_activations:
            logger.info_once("mxfp4_sm120: activations of the experts: %s", str(choice.activations))
        self.choice, self.backend = choice, choice.layer(self.shape)
        if choice.batch_invariant and not self.backend.fix_kernel():
            logger.warning_once(
                "mxfp4_sm120: VLLM_BATCH_INVARIANT=1, and the %s backend's answers may depend on the number of tokens",
                choice.backend.name,
            )
        never_capture_unless(self.backend, self.compilation_config)

    def stage(self, layer: RoutedExperts, device: torch.device) -> None:
        """Give the layer parameters in the checkpoint's layout to load into."""
        for name, parameter in parameters(MoEWeights.empty(self.shape, device), self.loader).items():
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Give the loaded tensors to the backend and keep only what it made of them.

        The first time it may be another backend than was chosen, if that can't represent these scales. Later times
        write into the tensors of the first, which CUDA graphs have captured. Nothing where nothing was loaded: some
        trainers call this for a whole engine. Raises ValueError.
        """
        if self.prepared and not any(hasattr(layer, name) for name in PARAMETERS):
            return
        weights = MoEWeights(**{field: getattr(layer, name).data for name, field in PARAMETERS.items()})
        if self.prepared:
            self.check_again(layer, weights)
        else:
            if self.loader.loaded or not self.invented:
                self.loader.finish()
            choice = selector.fall_through(self.choice, self.shape, weights, self.request, layer.layer_name)
            if choice.backend is not self.choice.backend:
                self.choose(choice)
        for name in PARAMETERS:
            delattr(layer, name)
        with reused_blocks():
            prepared = self.backend.prepare(weights)
        for name, tensor in prepared.items():
            if name in self.prepared:
                self.prepared[name].copy_(tensor)
            else:
                self.prepared[name] = torch.nn.Parameter(tensor, requires_grad=False)
            layer.register_parameter(f"packed_{name}", self.prepared[name])

    def check_again(self, layer: RoutedExperts, weights: MoEWeights) -> None:
        """Raises ValueError for new weights of a running engine that its backend can't take; the old ones answer."""
        try:
            self.loader.finish()
            if (reason := self.backend.why_not_weights(weights)) is not None:
                raise ValueError(f"{reason}; a running engine can't change its backend: restart it")
        except ValueError as error:
            for name in PARAMETERS:
                delattr(layer, name)
            reload.abandon(self.model_config)
            text = str(error).removeprefix(f"{layer.layer_name}.")
            raise ValueError(f"{layer.layer_name}.{text}") from None

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
            return ops.moe_routed(x, topk_ids, topk_weights, layer.layer_name)
        return self.backend.forward(self.prepared, x, topk_ids, topk_weights, layer.expert_map)

    def apply_monolithic(
        self, layer: RoutedExperts, x: Tensor, router_logits: Tensor, input_ids: Tensor | None = None
    ) -> Tensor:
        if torch.compiler.is_compiling():
            return ops.moe_logits(x, router_logits, layer.layer_name)
        return self.backend.forward_logits(self.prepared, x, router_logits, layer.expert_map)


def never_capture_unless(backend: Backend, compilation_config: Any) -> None:
    """Turn CUDA graphs off, before the engine captures any, where the backend can't run inside one."""
    if backend.capturable or not compilation_config.cudagraph_mode:
        return
    logger.warning_once(
        "mxfp4_sm120: CUDA graphs are off, because the %s backend can't be captured in one", backend.name
    )
    compilation_config.cudagraph_mode = CUDAGraphMode.NONE
