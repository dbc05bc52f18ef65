# SPDX-License-Identifier: Apache-2.0
"""What the plugin adds to vLLM's tables, in every process; other models meet none of it."""

from __future__ import annotations

from vllm_mxfp4_sm120 import NAME
from vllm_mxfp4_sm120.quantization import model_config
from vllm_mxfp4_sm120.quantization.config import Mxfp4Sm120Config
from vllm_mxfp4_sm120.quantization.features import GPT_OSS
from vllm_mxfp4_sm120.quantization.vllm_symbols import (
    MODELS_CONFIG_MAP,
    QUANTIZATION_METHODS,
    ModelRegistry,
    register_quantization_config,
)

# By name: imported only where such a model is made.
MODEL = "vllm_mxfp4_sm120.quantization.model:Mxfp4Sm120ForCausalLM"


def register() -> None:
    """Raises what vLLM raises. Again changes nothing."""
    if NAME not in QUANTIZATION_METHODS:
        register_quantization_config(NAME)(Mxfp4Sm120Config)
    ModelRegistry.register_model(model_config.ARCHITECTURE, MODEL)
    MODELS_CONFIG_MAP[GPT_OSS] = model_config.GptOssConfig
