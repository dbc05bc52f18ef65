# SPDX-License-Identifier: Apache-2.0
"""The native kernels' emulator as a backend of the suite."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from tests.kernels.emulated import Emulated
from vllm_mxfp4_sm120.backends.native import Native
from vllm_mxfp4_sm120.moe import MoEShape, MoEWeights

# Kernels of `launch_table` by the most tokens that they take.
CONFIGS = {0: 8, 1: 64, **dict.fromkeys(range(2, 9), 1 << 30)}


def emulated_native(library: ctypes.CDLL) -> type[Native]:
    """Native's class, computing with that library. Every kernel has its turn: which one follows from the case."""

    class EmulatedNative(Native):
        def __init__(self, shape: MoEShape) -> None:
            self.shape = shape  # without loading the CUDA library

        def prepare(self, weights: MoEWeights) -> Any:
            return Emulated(library, self.shape, weights)

        def forward_logits(
            self, prepared: Any, x: Tensor, router_logits: Tensor, expert_map: Tensor | None = None
        ) -> Tensor:
            able = [config for config, most in CONFIGS.items() if x.shape[0] <= most]
            return prepared(x, router_logits, able[self.shape.packed_bytes_per_expert // 51 % len(able)], expert_map)

    return EmulatedNative
