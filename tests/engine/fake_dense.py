# SPDX-License-Identifier: Apache-2.0
"""Dense kernels where no GPU is: their answers by float64, and a card that finds them faster at some numbers of tokens.

Each kernel's first call with so many tokens is a line of the log.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from vllm_mxfp4_sm120.dense import native, plan
from vllm_mxfp4_sm120.dense.int8 import Int8Weights

TABLE = tuple(native.DenseConfiguration(name, "int8" in name, 16, 256, 0) for name in ("bf16_fake", "int8_fake"))
# (tokens, microseconds of ours, of torch's): ours at 3 to 16, where prompts are decoded together, a half in a pipeline.
TIMES = ((1, 9.0, 8.0), (2, 9.0, 8.0), (16, 9.0, 12.0), (32, 9.0, 9.0))


@cache
def say(shape: object, bias: bool, tokens: int) -> None:
    print(f"fake_dense: {tokens} tokens of {shape}{' with a bias' if bias else ''}", flush=True)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, kernel: int) -> Tensor:
    assert TABLE[kernel].int8 == (scale is not None)
    say(tuple(weight.shape), bias is not None, len(x))
    exact = weight.double() if scale is None else Int8Weights(weight, scale).decode(dtype=torch.float64)
    return (x.double() @ exact.T + (0 if bias is None else bias.double())).bfloat16()


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    return Int8Weights(codes, scales).decode(dtype=torch.float64).bfloat16()


def make(layers, machine, prove) -> plan.Plan:
    timings = {
        shape: [plan.Timing(tokens, f"{'int8' if shape.int8 else 'bf16'}_fake", *times) for tokens, *times in TIMES]
        for shape in layers.values()
    }
    return plan.Plan(None, timings)


native.configurations = lambda: TABLE
native.linear = linear
native.dequantize = dequantize
plan.make = make
