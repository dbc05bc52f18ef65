# SPDX-License-Identifier: Apache-2.0
"""The vllm.general_plugins entry point. vLLM calls `register` in every process that it starts, maybe more than once."""

from __future__ import annotations

import multiprocessing

import torch
from packaging.version import InvalidVersion, Version

from vllm_mxfp4_sm120 import NAME, __version__, settings
from vllm_mxfp4_sm120.log import logger

OLDEST, TOO_NEW = Version("0.32"), Version("0.34")


def register() -> None:
    """Make `--quantization mxfp4_sm120` known to vLLM.

    Never raises, for vLLM calls it without a guard and for every model. What goes wrong is one logged line, other
    models are served as without the plugin, and `--quantization mxfp4_sm120` is refused with that line.
    """
    try:
        _ask_for_amx()
        reason = why_unsupported(_vllm_version())
        if reason is None:
            reason = _register()
        if reason is not None:
            _refuse(f"mxfp4_sm120 {__version__} is off with vLLM {_vllm_version()}: {reason}")
    except Exception as error:
        logger.error("mxfp4_sm120 %s is off: %s", __version__, _one_line(error))


def why_unsupported(vllm_version: str) -> str | None:
    """One line saying why nothing is imported from that vLLM, None where the plugin was written for it."""
    try:
        supported = OLDEST <= Version(Version(vllm_version).base_version) < TOO_NEW
    except InvalidVersion:
        supported = False
    if supported or settings.ANY_VLLM.get():
        return None
    return f"it was written for vLLM >= {OLDEST}, < {TOO_NEW}; {settings.ANY_VLLM.name}=1 tries any other"


def _vllm_version() -> str:
    """Of the vLLM that called, which is imported by then."""
    import vllm

    return str(getattr(vllm, "__version__", "of unknown version"))


def _register() -> str | None:
    """Register everything. One line saying what is missing, None if all is well."""
    try:
        from vllm_mxfp4_sm120.quantization import registration

        registration.register()
    except Exception as error:
        return _one_line(error)
    try:
        settings.check()
    except ValueError as error:
        if _first_process():  # an error for our models, in config.py
            logger.warning("mxfp4_sm120: %s", error)
    return None


def _refuse(reason: str) -> None:
    """Say so once, and to whoever asks by name."""
    end = "other models are served as without it"
    try:
        from vllm_mxfp4_sm120.quantization import refusal

        refusal.register(reason)
    except Exception as error:
        end += f", and vLLM's own method answers to {NAME}: {_one_line(error)}"
    if _first_process():
        logger.warning("%s; %s", reason, end)


def _ask_for_amx() -> None:
    """Ask Linux for AMX tiles, which it grants to a process only on request.

    vLLM's CPU attention uses them without asking: on such CPUs its worker then dies of SIGILL. Elsewhere, and in a
    torch without this function, nothing happens.
    """
    getattr(torch.cpu, "_init_amx", lambda: False)()


def _first_process() -> bool:
    """Not in vLLM's children, which would all say the same."""
    return multiprocessing.parent_process() is None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
