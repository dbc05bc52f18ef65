# SPDX-License-Identifier: Apache-2.0
"""The native kernels' emulator as a backend of the suite."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

from torch import Tensor

from tests.conformance.cases import Case
from tests.kernels.emulated import Emulated, configs
from vllm_mxfp4_sm120.backends.native import Native
from vllm_mxfp4_sm120.moe import MoEShape, MoEWeights

MOST_PRODUCTS = 8_000  # times 1024


def emulated_native(library: ctypes.CDLL, only: int | None = None) -> type[Native]:
    """Native's class, computing with that library. Every kernel has its turn: which one follows from the case.

    Or `only` one, by its place in the dispatch table.
    """

    workspaces: list[Tensor] = []  # the last one the largest: as in the library, all layers share it

    class EmulatedNative(Native):
        def __init__(self, shape: MoEShape) -> None:
            self.shape = shape  # without loading the CUDA library

        def prepare(self, weights: MoEWeights) -> Any:
            return Emulated(library, self.shape, weights)

        def _layer(
            self,
            prepared: Any,
            x: Tensor,
            router_logits: Tensor | None,
            topk_ids: Tensor | None,
            topk_weights: Tensor | None,
            expert_map: Tensor | None,
        ) -> Tensor:
            able = [config for config, most in enumerate(configs(library).values()) if x.shape[0] <= most]
            config = able[self.shape.packed_bytes_per_expert // 51 % len(able)] if only is None else only
            topk = None if topk_ids is None or topk_weights is None else (topk_ids, topk_weights)
            if not workspaces or workspaces[-1].numel() < prepared.workspace_bytes(x.shape[0]):
                workspaces.append(prepared.workspace(x.shape[0]))
            return prepared(x, router_logits, config, expert_map, workspaces[-1], topk)

    return EmulatedNative


def small(case: Case) -> Case:
    """The same, small enough for seconds: a block's threads run one after the other here."""
    while case.tokens * case.top_k * case.hidden_blocks * case.intermediate_blocks > MOST_PRODUCTS:
        case = replace(
            case,
            tokens=-(-case.tokens // 2),
            hidden_blocks=-(-case.hidden_blocks // 2),
            intermediate_blocks=-(-case.intermediate_blocks // 2),
        )
    return case
