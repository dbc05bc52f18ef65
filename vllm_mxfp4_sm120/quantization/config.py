"""What vLLM asks a quantization method: is this checkpoint yours, and which method serves that layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.platforms import current_platform

from vllm_mxfp4_sm120 import envs
from vllm_mxfp4_sm120.checkpoint import INDEX, MODEL_TYPE, QUANT_METHODS, Checkpoint, Packing, Sizes
from vllm_mxfp4_sm120.memory import configure_torch
from vllm_mxfp4_sm120.plugin import NAME


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
        """Claim what the user asked for by name, and on SM 12.x every packed GPT-OSS for which no name was given.

        What was asked for and can't be served is refused, with the reason, in `maybe_update_config`.
        """
        ours = user_quant is None and envs.AUTO.get() and current_platform.is_device_capability_family(120)
        packed_gpt_oss = (
            getattr(hf_config, "model_type", None) == MODEL_TYPE and hf_quant_cfg.get("quant_method") in QUANT_METHODS
        )
        return NAME if user_quant == NAME or (ours and packed_gpt_oss) else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Refuse, before any weight is read, what this plugin can't serve. Raises ValueError.

        A local checkpoint's headers are checked too; one that is still to be fetched is checked as it loads.
        """
        config = hf_config.to_dict() if hf_config is not None else {}
        Sizes.from_config(config, model_name)
        Packing.from_config(self.checkpoint, model_name)
        directory = Path(model_name)
        # Without weights there, vLLM may have been told to invent them (--load-format dummy).
        if directory.is_dir() and (any(directory.glob("*.safetensors")) or (directory / INDEX).exists()):
            Checkpoint(directory)
        # Here, because this model is ours, and no process has touched CUDA yet: workers inherit the environment.
        configure_torch()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm_mxfp4_sm120.quantization.fused_moe import Mxfp4Sm120MoEMethod

        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        if isinstance(layer, RoutedExperts):
            return Mxfp4Sm120MoEMethod(layer.moe_config)
        return None
