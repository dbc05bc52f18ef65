# SPDX-License-Identifier: Apache-2.0
"""The FP4 kernels on a CPU: one product of a warp, activations as records of terms, and the layer they compute."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from tests.kernels.emulated import Emulated
from vllm_mxfp4_sm120.moe import MoEShape, MoEWeights

SELECTORS = [
    (a_byte, a_thread, b_byte, b_thread)
    for a_byte in (0, 2)
    for a_thread in (0, 1)
    for b_byte in (0, 2)
    for b_thread in range(4)
]
# Code K_OF_NIBBLE[i] is nibble i of a word (kernels/csrc/fp4/weights.cuh).
K_OF_NIBBLE = (2, 0, 4, 6, 3, 1, 5, 7)
CODE_BYTES, SCALE_BYTES, STEP = 16, 16, 64


def product(
    library: ctypes.CDLL, selector: int, twin: bool, a: Tensor, b: Tensor, scales_a: Tensor, scales_b: Tensor, d: Tensor
) -> Tensor:
    """What lanes hold after a product: a int32 [32, 4], b int32 [32, 2], scales uint8 [32, 4], d float32 [32, 4]."""
    a, b, scales_a, scales_b, d = (tensor.contiguous().clone() for tensor in (a, b, scales_a, scales_b, d))
    library.fp4_multiply(
        selector, twin, *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, b, scales_a, scales_b, d))
    )
    return d


def fp4_configs(library: ctypes.CDLL) -> dict[str, int]:
    """The table's names in order, and each one's terms."""
    library.fp4_name.restype = ctypes.c_char_p
    found: dict[str, int] = {}
    while (name := library.fp4_name(len(found))) is not None:
        found[name.decode()] = library.fp4_terms(len(found))
    return found


class EmulatedFp4(Emulated):
    """A layer's weights; calls take a configuration of the FP4 kernels' table."""

    def __init__(self, library: ctypes.CDLL, shape: MoEShape, weights: MoEWeights) -> None:
        super().__init__(library, shape, weights)
        library.fp4_layer.restype = ctypes.c_char_p
        library.fp4_workspace.restype = library.fp4_records.restype = ctypes.c_int64

    def workspace_bytes(self, tokens: int) -> int:
        return self.library.fp4_workspace(*self._sizes(tokens))

    def _sizes(self, tokens: int) -> tuple[int, ...]:
        shape = self.shape
        return tokens, shape.hidden_size, shape.intermediate_size, shape.local_experts, shape.top_k

    def _launch(self) -> Callable[..., bytes | None]:
        return self.library.fp4_layer

    def terms(self, workspace: Tensor, tokens: int, terms: int, activations: bool) -> tuple[Tensor, Tensor]:
        """Of the workspace's last call, as terms.py has them: codes [terms, rows, K/2], scales [terms, rows, K/32]."""
        shape = self.shape
        rows, k = (tokens * shape.top_k, shape.intermediate_size) if activations else (tokens, shape.hidden_size)
        steps, record = -(-k // STEP), terms * 2 * CODE_BYTES + SCALE_BYTES
        at = self.library.fp4_records(*self._sizes(tokens), terms, activations)
        records = workspace[at : at + rows * steps * record].view(rows, steps, record)
        words = records[..., : terms * 2 * CODE_BYTES].reshape(rows, steps, terms, STEP // 2)
        nibbles = torch.stack((words & 15, words >> 4), dim=-1).view(rows, steps, terms, STEP // 8, 8)
        codes = torch.empty_like(nibbles)
        codes[..., list(K_OF_NIBBLE)] = nibbles
        codes = codes.permute(2, 0, 1, 3, 4).reshape(terms, rows, steps * STEP)
        scales = records[..., terms * 2 * CODE_BYTES :][..., : 2 * terms].reshape(rows, steps, terms, 2)
        scales = scales.permute(2, 0, 1, 3).reshape(terms, rows, steps * 2)
        beyond = codes[..., k:].any() or scales[..., k // 32 :].any()
        assert not beyond, "what lies beyond K isn't zero"
        packed = codes[..., :k:2] | codes[..., 1:k:2] << 4
        return packed, scales[..., : k // 32]
