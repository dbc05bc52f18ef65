"""What vLLM asks a quantization method: is this checkpoint yours, and which method serves that layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

NAME = "mxfp4_sm120"
# What checkpoints say, and what vLLM rewrites it to for GPT-OSS.
CHECKPOINT_METHODS = ("mxfp4", "gpt_oss_mxfp4")


class Mxfp4Sm120Config(QuantizationConfig):
    """Packed MXFP4 experts for GPT-OSS; everything else in the model stays BF16.

    `checkpoint` is the quantization_config of the checkpoint's config.json, None where it has none.
    """

    def __init__(self, checkpoint: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.checkpoint = checkpoint

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
        """Claim what the user asked for by name. `maybe_update_config` refuses what can't be served, with the reason."""
        return NAME if user_quant == NAME else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Refuse, before any weight is read, what this plugin can't serve. Raises ValueError."""
        model_type = getattr(hf_config, "model_type", None)
        if model_type != "gpt_oss":
            raise ValueError(
                f"--quantization {NAME} serves GPT-OSS only: {model_name} has model_type {model_type!r}, expected "
                "'gpt_oss'; leave the option out for this model"
            )
        method = (self.checkpoint or {}).get("quant_method")
        if method not in CHECKPOINT_METHODS:
            raise ValueError(
                f"--quantization {NAME} serves MXFP4 checkpoints only: {model_name} has quant_method {method!r} in "
                "config.json, expected 'mxfp4'; leave the option out, or use a checkpoint with packed experts"
            )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm_mxfp4_sm120.quantization.fused_moe import Mxfp4Sm120MoEMethod

        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        if isinstance(layer, RoutedExperts):
            return Mxfp4Sm120MoEMethod(layer.moe_config, prefix)
        return None
