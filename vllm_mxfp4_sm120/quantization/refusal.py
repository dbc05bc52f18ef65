# SPDX-License-Identifier: Apache-2.0
"""What is registered where the plugin is off: a name that refuses, or vLLM's own method would silently answer to it.

Depends on two names of vLLM's, so that it works where others are gone.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.quantization import QuantizationConfig, register_quantization_config

from vllm_mxfp4_sm120 import NAME
from vllm_mxfp4_sm120.quantization.spelling import means_us


class Refusal(QuantizationConfig):
    """Raises ValueError(`reason`) for `--quantization mxfp4_sm120`, and claims nothing."""

    reason = ""

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None) -> None:
        if means_us(user_quant, ()):
            raise ValueError(cls.reason)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Refusal:
        raise ValueError(cls.reason)

    @classmethod
    def get_name(cls) -> str:
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[Any]:
        return []

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_quant_method(self, layer: Any, prefix: str) -> None:
        raise ValueError(self.reason)


def register(reason: str) -> None:
    """Refuse with that line from now on. Raises what vLLM raises."""
    Refusal.reason = reason
    register_quantization_config(NAME)(Refusal)
