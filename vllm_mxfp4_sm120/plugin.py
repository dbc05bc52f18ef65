"""The vllm.general_plugins entry point. vLLM calls `register` in every process that it starts, maybe more than once."""

from __future__ import annotations

import logging

import torch
from packaging.version import Version

from vllm_mxfp4_sm120 import envs

logger = logging.getLogger("vllm.mxfp4_sm120")

NAME = "mxfp4_sm120"
OLDEST, TOO_NEW = Version("0.32"), Version("0.34")


def register() -> None:
    """Make `--quantization mxfp4_sm120` known to vLLM. Raises ValueError for a bad MXFP4_SM120_* variable."""
    from vllm import __version__ as vllm_version
    from vllm.model_executor.layers import quantization as vllm_quantization

    # Linux grants AMX tiles to a process only on request, and vLLM's CPU attention uses them without asking: on such
    # CPUs its worker then dies of SIGILL. This asks; elsewhere it does nothing.
    torch.cpu._init_amx()
    envs.check()
    if NAME in vllm_quantization.QUANTIZATION_METHODS:
        return
    warn_if_unsupported(vllm_version)
    from vllm_mxfp4_sm120.quantization import router
    from vllm_mxfp4_sm120.quantization.config import Mxfp4Sm120Config

    vllm_quantization.register_quantization_config(NAME)(Mxfp4Sm120Config)
    router.register()


def warn_if_unsupported(vllm_version: str) -> None:
    """One warning that names both versions, where this vLLM is not one that the plugin was written for."""
    if not OLDEST <= Version(Version(vllm_version).base_version) < TOO_NEW:
        logger.warning("mxfp4_sm120 supports vLLM >= %s, < %s; this is vLLM %s", OLDEST, TOO_NEW, vllm_version)
