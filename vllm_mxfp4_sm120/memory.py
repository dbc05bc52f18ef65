# SPDX-License-Identifier: Apache-2.0
"""Bytes: what a layer takes packed and upcast, what is free, the guard before an upcast, torch's memory settings."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vllm_mxfp4_sm120 import settings
from vllm_mxfp4_sm120.log import logger
from vllm_mxfp4_sm120.moe import MoEShape
from vllm_mxfp4_sm120.platform import Machine

GB10 = (12, 1)


def packed_bytes(shape: MoEShape) -> int:
    """Bytes of a layer's weights and scales as they are on disk, biases not counted."""
    return shape.local_experts * shape.packed_bytes_per_expert


def upcast_bytes(shape: MoEShape) -> int:
    """Bytes of a layer's weights in BF16, biases not counted: 3.76 times the packed ones."""
    return shape.local_experts * 3 * shape.intermediate_size * shape.hidden_size * 2


def free_bytes() -> int:
    """Bytes free on the current CUDA device; of the machine's memory where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def why_no_upcast(machine: Machine, shape: MoEShape) -> str | None:
    """One line refusing a full upcast on SM120 and newer, None where it may go ahead.

    Those cards have kernels for packed weights, and too little memory for others: 120b's experts are 229 GB in BF16.
    """
    if machine.capability is None or machine.capability < (12, 0) or settings.FORCE_UPCAST.get():
        return None
    return (
        f"a full upcast takes {upcast_bytes(shape):,} bytes for every layer (packed: {packed_bytes(shape):,}) and "
        f"{free_bytes():,} are free: refused on SM120 and newer; {settings.FORCE_UPCAST.name}=1 allows it"
    )


def warn_upcast(shape: MoEShape) -> None:
    """Warn before a layer is upcast that doesn't fit, so that the cause stands above torch's out-of-memory error."""
    needed, free = upcast_bytes(shape), free_bytes()
    if needed > free:
        logger.warning("upcasting a layer's experts takes %s bytes and only %s are free", f"{needed:,}", f"{free:,}")


@contextmanager
def reused_blocks() -> Iterator[None]:
    """Let torch use freed CUDA memory again while a layer's weights are rearranged, as it does by default.

    vLLM loads under max_split_size_mb:20. Torch's allocator then takes a new block of 20 MiB for whatever has 1 to 10,
    and once that is free, uses it for nothing smaller than itself: one expert's temporaries after the other's, until
    the GPU is full (125 GiB of an H200 were seen). Expandable segments know no such blocks.
    """
    changeable = hasattr(torch._C, "_accelerator_setAllocatorSettings")  # not a public name, but what vLLM calls, too
    if not changeable or not torch.cuda.is_available() or torch.cuda.get_allocator_backend() != "native":
        yield
        return
    settings = _allocator_settings()
    others = re.sub(r",?\s*max_split_size_mb:\d+", "", settings).lstrip(", ")
    torch._C._accelerator_setAllocatorSettings(others)
    try:
        yield
    finally:
        torch._C._accelerator_setAllocatorSettings(settings)


def _allocator_settings() -> str:
    """All of them, for the setter resets what it isn't told."""
    if hasattr(torch._C, "_accelerator_getAllocatorSettings"):
        return torch._C._accelerator_getAllocatorSettings()
    return str(torch.cuda.memory._snapshot()["allocator_settings"]["PYTORCH_CUDA_ALLOC_CONF"])


def configure_torch(capability: tuple[int, int] | None = None) -> None:
    """Settings that this plugin's models run best with, by environment, so that worker processes inherit them.

    Call it in every process before CUDA is initialised, and only when this plugin serves the model: they hold for all
    of torch. Calling again changes nothing, and what the user set stays.
    - Expandable segments, so that memory freed while a layer's weights are rearranged fits whatever comes next; only
      where one GPU is visible, for vLLM's all-reduce between several dies of them (vllm-project/vllm#42609). vLLM
      refuses them together with a KV connector: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False is the way out. Not
      on GB10, SM 12.1, whose memory is the system's: errors of its driver are reported with them.
    - TF32 for the matmuls that stay in float32, through vLLM's own setting, which its workers apply at their start.
    """
    if torch.version.cuda is None:
        return
    # Torch reads the second name too and prefers it; vLLM's check of KV connectors knows only the first.
    users_own = "PYTORCH_CUDA_ALLOC_CONF" in os.environ or "PYTORCH_ALLOC_CONF" in os.environ
    if not users_own and capability != GB10 and torch.cuda.device_count() == 1:
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    os.environ.setdefault("VLLM_FLOAT32_MATMUL_PRECISION", "high")
