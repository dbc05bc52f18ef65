# SPDX-License-Identifier: Apache-2.0
"""What vLLM asks a quantization method: is this checkpoint yours, and which method serves that layer."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from vllm_mxfp4_sm120 import NAME, settings
from vllm_mxfp4_sm120.checkpoint import MODEL_TYPE, QUANT_METHODS, Packing, Sizes
from vllm_mxfp4_sm120.quantization.spelling import means_us
from vllm_mxfp4_sm120.quantization.vllm_symbols import (
    QUANTIZATION_METHODS,
    LinearBase,
    QuantizationConfig,
    QuantizeMethodBase,
    RoutedExperts,
    current_platform,
)

if TYPE_CHECKING:
    from vllm_mxfp4_sm120.quantization.dense import Dense

# In vLLM's copy of quantization_config: the model was claimed without being asked for by name.
CLAIMED = "claimed_by_mxfp4_sm120"


class Mxfp4Sm120Config(QuantizationConfig):
    """Packed MXFP4 experts for GPT-OSS; everything else in the model stays BF16.

    `checkpoint` is the quantization_config of the checkpoint's config.json, None where it has none.
    """

    def __init__(self, checkpoint: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.checkpoint = checkpoint

    @cached_property
    def dense(self) -> Dense:
        """Imported with a model of ours: this file is in every process, whatever it serves."""
        from vllm_mxfp4_sm120.quantization.dense import Dense

        return Dense()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Mxfp4Sm120Config:
        return cls(config)

    @classmethod
    def get_name(cls) -> str:
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # BF16 tensor cores

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim what the user asked for by name, and on SM 12.x every packed GPT-OSS for which no name was given.

        What can't be served is refused or left to vLLM in `model_config.py`, which sees the whole configuration.
        Raises ValueError for a misspelling of the name.
        """
        gpt_oss = getattr(hf_config, "model_type", None) == MODEL_TYPE
        if means_us(user_quant, QUANTIZATION_METHODS):
            return NAME
        if user_quant is not None or not gpt_oss or hf_quant_cfg.get("quant_method") not in QUANT_METHODS:
            return None
        if not current_platform.is_device_capability_family(120) or not settings.AUTO.get():
            return None
        hf_quant_cfg[CLAIMED] = True
        return NAME

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Raises ValueError for what isn't a packed GPT-OSS; the only check that a draft model meets."""
        Sizes.from_config(hf_config.to_dict() if hf_config is not None else {}, model_name)
        Packing.from_config(self.checkpoint, model_name)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm_mxfp4_sm120.quantization.fused_moe import Mxfp4Sm120MoEMethod
        from vllm_mxfp4_sm120.quantization.reload import LinearMethod

        if isinstance(layer, LinearBase):
            return self.dense.method(prefix) or LinearMethod()
        if isinstance(layer, RoutedExperts):
            return Mxfp4Sm120MoEMethod(layer.moe_config)
        return None
