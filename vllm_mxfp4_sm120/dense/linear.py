# SPDX-License-Identifier: Apache-2.0
"""The linear layer as an operator: for each number of tokens the kernel that the card chose, or torch's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vllm_mxfp4_sm120.dense import native
from vllm_mxfp4_sm120.dense.int8 import Decode, Int8Weights

TORCHS_OWN = -1  # in place of a kernel's number


@dataclass(frozen=True, order=True)
class LinearShape:
    """One rank's layer: `rows` outputs (N), `columns` inputs (K); `int8`: its weights are `Int8Weights`."""

    rows: int
    columns: int
    int8: bool
    bias: bool = True

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns} {'int8' if self.int8 else 'bf16'}"


# By rows, columns, INT8: the number of the kernel for each number of tokens from 0 on, `TORCHS_OWN` beyond. Written
# while models are made (`plan.py`), in each process; what is compiled or captured reads it once more.
_kernels: dict[tuple[int, int, bool], tuple[int, ...]] = {}


def serve(shape: LinearShape, kernels: Sequence[int]) -> None:
    """From now on these kernels, by numbers of tokens, answer for layers of that shape."""
    _kernels[shape.rows, shape.columns, shape.int8] = tuple(kernels)


def is_served(rows: int, columns: int, int8: bool) -> bool:
    """Is there a number of tokens for which a kernel answers?"""
    return any(kernel != TORCHS_OWN for kernel in _kernels.get((rows, columns, int8), ()))


def kernel_for(tokens: int, rows: int, columns: int, int8: bool) -> int:
    """Its number in the library's table, or `TORCHS_OWN`."""
    kernels = _kernels.get((rows, columns, int8), ())
    return kernels[tokens] if tokens < len(kernels) else TORCHS_OWN


def torchs_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, decode: Decode | None = None
) -> Tensor:
    """What answers where no kernel does, and what kernels are timed beside; `decode` as of `Int8Weights.linear`."""
    if scale is None:
        return functional.linear(x, weight, bias)
    return Int8Weights(weight, scale).linear(x, bias, decode)


# The wall before a compiled model, which vLLM keeps for later starts, on other cards, too: inside, what answers depends
# on the card and on the number of tokens. No layer's name is an argument, so that all layers compile to the same code.
@torch.library.custom_op("mxfp4_sm120::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x bf16 [..., K], weight bf16 [N, K] or int8 with scale bf16 [K/64, N, 2], bias bf16 [N] -> [..., N]."""
    rows, columns = weight.shape
    kernel = kernel_for(x.numel() // columns, rows, columns, scale is not None)
    if kernel != TORCHS_OWN:
        out = native.linear(x.reshape(-1, columns).contiguous(), weight, bias, scale, kernel)
        return out.view(*x.shape[:-1], rows)
    # Where kernels were proved for this shape, the one that decodes was, too.
    proved = (rows, columns, True) in _kernels
    return torchs_linear(x, weight, scale, bias, native.dequantize if proved else None)


@linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
