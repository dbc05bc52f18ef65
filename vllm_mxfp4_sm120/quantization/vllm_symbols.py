# SPDX-License-Identifier: Apache-2.0
"""Every name of vLLM's that this plugin uses, from where vLLM exports it, and what would be lost without it.

Importing this file is the test whether the plugin fits a vLLM: `plugin.register` does, and where a name is gone, the
plugin is off. Only `refusal.py`, which must work then, imports two names by itself.
"""

from vllm import envs  # whether batches must not change an answer
from vllm.config import (
    CUDAGraphMode,  # to turn graphs off for backends that can't be captured
    VllmConfig,  # what features.py reads
    get_current_vllm_config,  # the options of the engine that a layer is made for
)
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size  # whose sinks
from vllm.forward_context import get_forward_context  # layers by name, from inside a compiled model
from vllm.logger import init_logger  # lines that are said once
from vllm.model_executor.custom_op import op_registry_oot  # whether another plugin has taken the router's layer
from vllm.model_executor.layers.fused_moe import (
    FusedMoEConfig,  # sizes, ranks and activation of a layer
    FusedMoEMethodBase,  # the experts' method
    FusedMoEParallelConfig,
    GateLinear,  # the router's layer, for its kernel
    MoEActivation,
    RoutedExperts,  # the layer that holds the experts' parameters
    RoutingMethodType,  # whether the backend may choose the experts
)
from vllm.model_executor.layers.linear import (
    LinearBase,
    QKVParallelLinear,  # which of its three weights have come
    UnquantizedLinearMethod,  # attention stays BF16
)
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,  # vLLM's own names, which are no misspelling of ours
    QuantizationConfig,  # the claim itself
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase  # a return type
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod  # of lm_head in BF16
from vllm.model_executor.model_loader.reload.layerwise import (
    LAYERWISE_INFO,  # old weights, for a reload that is refused
    finalize_layerwise_reload,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader  # for sinks
from vllm.model_executor.models import ModelRegistry  # the model class that checks tensors as they load (model.py)
from vllm.model_executor.models.config import MODELS_CONFIG_MAP  # where the engine's whole configuration is seen first
from vllm.model_executor.models.gpt_oss import GptOssForCausalLM  # the model
from vllm.model_executor.models.utils import WeightsMapper  # to see the names of an adapter's tensors
from vllm.model_executor.utils import set_weight_attrs  # how a parameter gets its loader
from vllm.platforms import current_platform  # the card, without initialising CUDA

from vllm_mxfp4_sm120 import log

logger = init_logger(log.logger.name)  # the plugin's own; vLLM adds its methods to it

__all__ = [
    "LAYERWISE_INFO",
    "MODELS_CONFIG_MAP",
    "QUANTIZATION_METHODS",
    "CUDAGraphMode",
    "FusedMoEConfig",
    "FusedMoEMethodBase",
    "FusedMoEParallelConfig",
    "GateLinear",
    "GptOssForCausalLM",
    "LinearBase",
    "MoEActivation",
    "ModelRegistry",
    "QKVParallelLinear",
    "QuantizationConfig",
    "QuantizeMethodBase",
    "RoutedExperts",
    "RoutingMethodType",
    "UnquantizedEmbeddingMethod",
    "UnquantizedLinearMethod",
    "VllmConfig",
    "WeightsMapper",
    "current_platform",
    "default_weight_loader",
    "envs",
    "finalize_layerwise_reload",
    "get_current_vllm_config",
    "get_forward_context",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "logger",
    "op_registry_oot",
    "register_quantization_config",
    "set_weight_attrs",
]
