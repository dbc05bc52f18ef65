# SPDX-License-Identifier: Apache-2.0
"""Who computes a linear layer (qkv, o, lm_head): torch, this plugin's kernels, vLLM's where they can be imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from vllm_mxfp4_sm120.backends.native import library
from vllm_mxfp4_sm120.dense import native
from vllm_mxfp4_sm120.dense.int8 import Int8Weights
from vllm_mxfp4_sm120.platform import Machine

Linear = Callable[[Tensor], Tensor]  # x bf16 [M, K] -> bf16 [M, N]

BF16_BYTES, INT8_BYTES, FP8_BYTES = 2.0, 17 / 16, 1.0  # a weight; INT8 with a BF16 scale for each 32


@dataclass(frozen=True)
class Kind:
    """`tolerance` is the largest relative error against float64 on the BF16 weights; None where it isn't checked.

    8 bits make about 0.5 % (INT8 with a scale per 32) and 2.6 % (FP8 with one per row), FP8 inputs as much again.
    """

    name: str
    make: Callable[[Tensor], Linear]
    weight_bytes: float
    tolerance: float | None
    on_cpu: bool = False
    # Of an inner size K: the kernels to choose the fastest from at each size, a keyword argument of the linear.
    kernels: Callable[[int], list[int]] = lambda k: []


def torch_bf16(weight: Tensor) -> Linear:
    return lambda x: functional.linear(x, weight)


def torch_int8(weight: Tensor) -> Linear:
    """What `dense: int8` does where no kernel answers: decode, on a GPU by the library's kernel, then multiply."""
    encoded = Int8Weights.quantize(weight)
    if not weight.is_cuda:
        return encoded.linear
    library.load()
    return partial(encoded.linear, decode=native.dequantize)


def native_bf16(weight: Tensor) -> Linear:
    library.load()
    return partial(native.linear, weight=weight)


def native_int8(weight: Tensor) -> Linear:
    library.load()
    encoded = Int8Weights.quantize(weight)
    return partial(native.linear, weight=encoded.codes, scale=encoded.scales)


def native_kernels(int8: bool, k: int) -> list[int]:
    """The library's kernels that take such weights."""
    table = enumerate(native.configurations())
    return [number for number, config in table if config.int8 == int8 and k % native.limits().k_multiple == 0]


def vllm_marlin(kind: str) -> Callable[[Tensor], Linear]:
    """vLLM's Marlin, on weights and scales of the right sizes but any values: for its time only."""

    def make(weight: Tensor) -> Linear:
        from vllm import _custom_ops as ops
        from vllm.scalar_type import scalar_types

        (rows, k), device = weight.shape, weight.device
        type_ = scalar_types.uint8b128 if kind == "int8" else scalar_types.float8_e4m3fn
        packed = torch.randint(0, 2**31 - 1, (k // 16, rows * 4), dtype=torch.int32, device=device)
        scale = torch.rand(k // 32 if kind == "int8" else 1, rows, device=device).bfloat16() * 0.01
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        workspace = torch.zeros(multiprocessors * 64, dtype=torch.int32, device=device)

        def linear(x: Tensor) -> Tensor:
            out: Tensor = ops.marlin_gemm(
                x, None, packed, None, scale, None, None, None, workspace, type_, x.shape[0], rows, k,
                use_atomic_add=False, use_fp32_reduce=True,
            )  # fmt: skip
            return out

        return linear

    return make


def vllm_cutlass_fp8(weight: Tensor) -> Linear:
    """vLLM's CUTLASS W8A8, a scale a row and a token: the quantization of x is part of its time."""
    from vllm import _custom_ops as ops

    scale = weight.abs().amax(1, keepdim=True).float() / 448
    codes, scales = (weight.float() / scale).to(torch.float8_e4m3fn).t(), scale.t().contiguous()

    def linear(x: Tensor) -> Tensor:
        x8, x_scale = ops.scaled_fp8_quant(x, use_per_token_if_dynamic=True)
        out: Tensor = ops.cutlass_scaled_mm(x8, codes, x_scale, scales, torch.bfloat16)
        return out

    return linear


KINDS = (
    Kind("torch-bf16", torch_bf16, BF16_BYTES, 1e-2, on_cpu=True),
    Kind("torch-int8", torch_int8, INT8_BYTES, 2e-2, on_cpu=True),
    Kind("native-bf16", native_bf16, BF16_BYTES, 1e-2, kernels=partial(native_kernels, False)),
    Kind("native-int8", native_int8, INT8_BYTES, 2e-2, kernels=partial(native_kernels, True)),
    Kind("vllm-marlin-int8", vllm_marlin("int8"), INT8_BYTES, None),
    Kind("vllm-marlin-fp8", vllm_marlin("fp8"), FP8_BYTES, None),
    Kind("vllm-cutlass-fp8", vllm_cutlass_fp8, FP8_BYTES, 6e-2),
)
ALL = tuple(kind.name for kind in KINDS)


def names(machine: Machine) -> tuple[str, ...]:
    """Who is timed unless the user says otherwise."""
    if machine.capability is None:
        return tuple(kind.name for kind in KINDS if kind.on_cpu)
    return tuple(kind.name for kind in KINDS if kind.name != "torch-int8")  # decoding lm_head a call is no way to serve


def kind(name: str, machine: Machine) -> Kind:
    """One of ALL. Raises RuntimeError where it can't be."""
    found = next(kind for kind in KINDS if kind.name == name)
    if machine.capability is None and not found.on_cpu:
        raise RuntimeError("it needs an NVIDIA GPU")
    return found
