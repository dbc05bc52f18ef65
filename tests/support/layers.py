# SPDX-License-Identifier: Apache-2.0
"""Random layers and inputs for tests of every kind; the proof and the conformance suite draw their own problems."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vllm_mxfp4_sm120.moe import MoEShape, MoEWeights

REAL_SCALES = (118, 124)  # those of published checkpoints: weights around 0.02


def random_weights(
    shape: MoEShape, device: torch.device | str = "cpu", seed: int = 0, scales: tuple[int, int] | None = None
) -> MoEWeights:
    """Weights with every code and scales from the first to the last of `scales`.

    None: three that give a product of inputs near 1 outputs of 1 to 2, for codes have a standard deviation near 3.
    """
    generator = torch.Generator(device).manual_seed(seed)
    weights = MoEWeights.empty(shape, device)
    for codes, scale, k in (
        (weights.w13, weights.w13_scale, shape.hidden_size),
        (weights.w2, weights.w2_scale, shape.intermediate_size),
    ):
        middle = 127 - round(math.log2(3 * math.sqrt(k)))
        low, high = scales or (middle - 1, middle + 1)
        codes.copy_(torch.randint(0, 256, codes.shape, dtype=torch.uint8, device=device, generator=generator))
        scale.copy_(torch.randint(low, high + 1, scale.shape, dtype=torch.uint8, device=device, generator=generator))
    for bias in (weights.w13_bias, weights.w2_bias):
        if bias is not None:
            bias.normal_(generator=generator)
    return weights


def random_inputs(
    shape: MoEShape, tokens: int, device: torch.device | str = "cpu", seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Activations bf16 [tokens, H] and router logits float32 [tokens, E], all standard normal."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(tokens, shape.hidden_size, device=device, generator=generator).bfloat16()
    return x, torch.randn(tokens, shape.num_experts, device=device, generator=generator)


BAD, OVERFLOWS = [5, 6, 7], 3  # rows of `adversarial`: with NaN or infinity; whose sums are beyond FP32


def adversarial(rows: int, k: int) -> Tensor:
    """bf16 [rows, k] of blocks that are hard to write as FP4 terms.

    Far neighbours, zeros, subnormals, the largest number, ties, NaN, infinity.
    """
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, k, generator=generator)
    x[0, ::32] *= 2**20
    x[1], x[2], x[3] = 0, x[3] * 2**-130, x[4].sign() * torch.finfo(torch.bfloat16).max
    x[4] = torch.arange(k) % 29 * 0.25 - 3.5
    x[5, 1], x[6, 2], x[7, 3] = torch.nan, torch.inf, -torch.inf
    x[8] = -0.0
    x[9] = x[9] * 2.0 ** torch.randint(-140, 120, (k,), generator=generator)
    return x.bfloat16()
