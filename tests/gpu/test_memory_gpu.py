# SPDX-License-Identifier: Apache-2.0
"""What torch's CUDA allocator takes while a layer is prepared the way vLLM loads it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from vllm_mxfp4_sm120 import memory
from vllm_mxfp4_sm120.backends.native.layout import tile_experts
from vllm_mxfp4_sm120.moe import MoEShape, MoEWeights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture
def as_vllm_loads() -> Iterator[None]:
    settings = memory._allocator_settings()
    torch._C._accelerator_setAllocatorSettings(",".join(filter(None, (settings, "max_split_size_mb:20"))))
    yield
    torch._C._accelerator_setAllocatorSettings(settings)


def test_temporaries_are_used_again(as_vllm_loads: None) -> None:
    """They stay within 600 MiB, whatever the number of experts; without `reused_blocks` eight take more."""
    grown = []
    for context in (memory.reused_blocks(), nullcontext()):
        weights = MoEWeights.empty(MoEShape(8, 8, 2880, 2880, 4), "cuda")
        weights.w13_scale.fill_(127)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        with context:
            tile_experts(weights.w13, weights.w13_scale, "w13")
        grown.append(torch.cuda.memory_reserved() - before)
    assert grown[0] < 600 << 20 < grown[1]
