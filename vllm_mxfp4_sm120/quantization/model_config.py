# SPDX-License-Identifier: Apache-2.0
"""The first place where vLLM shows a model's whole configuration: what can't be served ends here, before any weight."""

from __future__ import annotations

from pathlib import Path

from vllm_mxfp4_sm120 import NAME, settings
from vllm_mxfp4_sm120.checkpoint import INDEX, Checkpoint, check_config
from vllm_mxfp4_sm120.memory import configure_torch
from vllm_mxfp4_sm120.quantization import features
from vllm_mxfp4_sm120.quantization.config import CLAIMED
from vllm_mxfp4_sm120.quantization.features import GPT_OSS
from vllm_mxfp4_sm120.quantization.vllm_symbols import (
    MODELS_CONFIG_MAP,
    VllmConfig,
    current_platform,
    logger,
)

# vLLM's GPT-OSS with a check of every tensor as it loads: what our models are made of instead (model.py).
ARCHITECTURE = "Mxfp4Sm120ForCausalLM"
VLLMS_OWN = "gpt_oss_mxfp4"


class GptOssConfig(MODELS_CONFIG_MAP[GPT_OSS]):
    """vLLM's adjustments of a GPT-OSS engine's configuration, followed by ours where the model is ours."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Raises ValueError for what was asked for by name and can't be served."""
        super().verify_and_update_config(vllm_config)
        model = vllm_config.model_config
        if model.quantization != NAME:
            return
        reason = features.why_not(vllm_config)
        claimed = (model.model_arch_config.quantization_config or {}).pop(CLAIMED, False)
        if reason is not None and not claimed:
            raise ValueError(f"--quantization {NAME} can't serve {model.model}: {reason}")
        if reason is not None:
            logger.warning("mxfp4_sm120 leaves %s to vLLM's own experts: %s", model.model, reason)
            model.quantization = VLLMS_OWN
            return
        settings.check()
        check(vllm_config)
        from vllm_mxfp4_sm120.quantization import dense  # not for other models, see config.py

        dense.settle(vllm_config)
        # Here, because this model is ours, and no process has touched CUDA yet: workers inherit the environment.
        capability = current_platform.get_device_capability()
        configure_torch(None if capability is None else tuple(capability))
        model.hf_config.architectures = [ARCHITECTURE]


def check(vllm_config: VllmConfig) -> None:
    """Raises ValueError for a config.json, as overridden, or a local folder that can't be served as it is meant.

    What is still to be fetched, or isn't safetensors, is checked as it loads.
    """
    model, directory = vllm_config.model_config, Path(vllm_config.model_config.model)
    config = model.hf_config.to_dict()
    has_weights = any(directory.glob("*.safetensors")) or (directory / INDEX).exists()
    streamed = bool(model.model_weights)  # of an object store, of which vLLM has fetched config and index only
    if vllm_config.load_config.load_format != "dummy" and directory.is_dir() and has_weights and not streamed:
        Checkpoint(directory, config)
    else:
        check_config(config, model.model)
