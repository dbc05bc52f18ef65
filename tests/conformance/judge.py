# SPDX-License-Identifier: Apache-2.0
"""Right or wrong: an answer against the float64 reference, each token's row and each column by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.conformance.cases import Case, Tensors
from vllm_mxfp4_sm120 import mxfp4
from vllm_mxfp4_sm120.moe import Activation, activate, reference

# Beyond this, what is kept on the way (in the native kernels an expert's outputs, 2^65 at most) may be infinite.
OVERFLOW = 2.0**60
# Below this nobody looks: SiLU squares it, and kernels that keep weights smaller than they are (native: 2^-48) would
# lose it. Outputs are judged by this where theirs is smaller; tokens whose activations are all smaller aren't judged.
UNDERFLOW = 2.0**-60
# What is left where large products cancel before SwiGLU, relative to them: in float32 few of its bits are right.
CANCELLED = 2.0**-16
# What the native kernels keep on the way is four columns of an expert together, exact beside one 2^20 times as large:
# an output smaller than that is judged as if it were that large.
NEIGHBOURS, FAR = 4, 2.0**-20


@dataclass(frozen=True)
class Expected:
    """Of one case, float64: `value` [M, H] is the reference's answer, `size` [M, H] what its errors are measured by:

    the root of the sum of the squares of all the products that were added up. An output that happens to be near zero,
    where they cancel, has no smaller errors than its neighbours. `judged` [M] is False for tokens that may
    overflow, vanish or cancel.
    """

    value: Tensor
    size: Tensor
    judged: Tensor

    @classmethod
    def of(cls, case: Case, given: Tensors) -> Expected:
        activation, weights = Activation(case.activation), given.weights
        value = reference(weights, given.x, given.topk_ids, given.topk_weights, activation, given.expert_map)
        squares, largest = torch.zeros_like(value), value.new_zeros(len(value))
        lost = value.new_zeros(len(value), dtype=torch.bool)
        for local, expert in enumerate(case.local_experts):
            token, slot = (given.topk_ids == expert).nonzero(as_tuple=True)
            if not len(token):
                continue
            x, gate = given.x[token].double(), given.topk_weights[token, slot].double()
            w13 = mxfp4.dequantize(weights.w13[local], weights.w13_scale[local], torch.float64)
            w2 = mxfp4.dequantize(weights.w2[local], weights.w2_scale[local], torch.float64)
            hidden, spread = x @ w13.T, x.square() @ w13.square().T
            if weights.w13_bias is not None:
                hidden += weights.w13_bias[local].double()
            activated = activate(hidden, activation)
            down = activated.square() @ w2.square().T
            if weights.w2_bias is not None:
                down += weights.w2_bias[local].double().square()
            squares.index_add_(0, token, down * gate.square()[:, None])
            peak = torch.stack((spread.sqrt().amax(1), activated.abs().amax(1), down.sqrt().amax(1))).amax(0)
            largest[token] = largest[token].maximum(peak)
            most = activated.abs().amax(1)
            lost[token] |= (most > 0) & (most < UNDERFLOW)
            lost[token] |= ((hidden.abs() < spread.sqrt() * CANCELLED) & (spread.sqrt() > 256)).any(1)
        size = (squares + value.square()).sqrt()
        largest_of_four = size.unflatten(1, (-1, NEIGHBOURS)).amax(2).repeat_interleave(NEIGHBOURS, 1)
        size = size.maximum(largest_of_four.nan_to_num(0, 0) * FAR)
        odd = ~(given.x.isfinite().all(1) & given.topk_weights.isfinite().all(1))
        return cls(value, size, odd | ((largest < OVERFLOW) & ~lost))

    def flip(self) -> Expected:
        """Of the same tokens in the opposite order."""
        return Expected(self.value.flip(0), self.size.flip(0), self.judged.flip(0))


def complaint(answer: Tensor, expected: Expected, tolerance: float) -> str | None:
    """One line that says where `answer` bf16 [M, H] is wrong; None if it's right.

    Each row's and each column's errors, in units of their sizes, have a root mean square of at most `tolerance`, and
    some more where they are few. NaN or infinity stands where the reference has either, and nowhere else.
    """
    value = expected.value
    if answer.dtype != torch.bfloat16 or answer.shape != value.shape:
        return f"answered {answer.dtype} {list(answer.shape)}, expected torch.bfloat16 {list(value.shape)}"
    finite, judged = value.isfinite(), expected.judged[:, None].expand_as(value)
    for wrong, what in (
        (judged & finite & ~answer.isfinite(), "a number"),
        (judged & ~finite & answer.isfinite(), "NaN"),
    ):
        if wrong.any():
            token, column = wrong.nonzero()[0].tolist()
            return (
                f"{answer[token, column]:g} at token {token}, column {column} ({int(wrong.any(1).sum())} tokens), "
                f"expected {what}: {value[token, column]:.6g}"
            )
    counted = judged & finite
    errors = torch.where(counted, (answer.double() - value) / expected.size.clamp(min=UNDERFLOW), 0)
    for dim, what, most in ((1, "token", 16), (0, "column", 4)):
        count = counted.sum(dim).clamp(min=1)
        error = (errors.square().sum(dim) / count).sqrt()
        # A mean of n squares scatters by a few times the root of 2 / n. No more than `most` count: one activation may
        # outweigh a token's others, and tokens may be alike (where biases are all), and so their errors.
        ratio = error / (tolerance * (1 + 3 / count.clamp(max=most).sqrt()))
        if ratio.numel() and not ratio.max() <= 1:
            worst, wrong = int(ratio.argmax()), int((ratio > 1).sum())
            return (
                f"{what} {worst} is off by {error[worst]:.2g} of its size, expected at most {tolerance:g} "
                f"({wrong} of {len(ratio)} {what}s are wrong)"
            )
    return None
