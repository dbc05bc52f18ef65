# SPDX-License-Identifier: Apache-2.0
"""The native kernels on a GPU with odd inputs: columns and tokens of very different sizes, NaN, infinity, ids."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.gpu.native_layer import TOLERANCE, Layer, error, inputs, real_weights, why_not
from vllm_mxfp4_sm120.backends.native import Native
from vllm_mxfp4_sm120.moe import MoEShape, reference, topk_softmax

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

# Each form of the decode kernel; grouped ones with and without a routing kernel of their own, small and large tiles.
TOKENS = (1, 8, 16, 60, 150, 700)
# As int32 bits, whose upper half is a BF16's: quiet, signalling, negative, ones only.
NANS = (0x7FFFFFFF, 0x7F810000, 0xFFC00000 - (1 << 32), -1)


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer(MoEShape(16, 16, 736, 672, 4))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("far", [20, -20])
def test_each_column_by_itself(tokens: int, far: int):
    """Neighbouring columns are 2^20 times as large or as small, whichever of the four that are packed together."""
    shape = MoEShape(8, 8, 2880, 352, 2, has_bias=False)
    weights = real_weights(shape)
    weights.w2_scale[:, torch.arange(2880) * 5 // 4 % 5 == 0] += far
    layer = Layer(shape, weights)
    x, logits = inputs(shape, tokens)
    x[tokens // 2 :: 7] *= 2**10
    x[tokens // 3 :: 7] *= 2**-10
    out, expected = layer(x, logits).double(), layer.expected(x, logits)
    sizes = expected.abs().amax(0)
    assert sizes.max() > 2**19 * sizes.min()
    error, expected = (out - expected) / sizes, expected / sizes
    rows = error.norm(dim=1) / expected.norm(dim=1)
    assert rows.max() <= 1.2 * TOLERANCE  # of 2880 columns each
    columns = error.norm(dim=0) / expected.norm(dim=0)
    assert columns.square().mean().sqrt() <= TOLERANCE
    if tokens >= 60:
        assert columns.max() <= TOLERANCE * (1 + 5 / tokens**0.5)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("where", ["x", "logits", "topk_weights"])
def test_a_nan_stays_with_its_token(layer: Layer, tokens: int, where: str):
    x, logits = inputs(layer.shape, tokens)
    ids, weights = topk_softmax(logits, layer.shape.top_k)

    def run() -> Tensor:
        if where == "topk_weights":
            return layer.backend.forward(layer.prepared, x, ids, weights)
        return layer(x, logits)

    bad = tokens // 2
    clean, others = run(), torch.arange(tokens, device="cuda") != bad
    bits = {"x": x.view(torch.int16), "logits": logits.view(torch.int32), "topk_weights": weights.view(torch.int32)}
    for nan in NANS:
        bits[where][bad, 3] = nan >> 16 if where == "x" else nan
        poisoned = run()
        assert bool(poisoned[bad].isnan().all()) and torch.equal(poisoned[others], clean[others]), hex(nan)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("poison", [torch.inf, -torch.inf, 3e38])
def test_infinity_stays_with_its_token(layer: Layer, tokens: int, poison: float):
    x, logits = inputs(layer.shape, tokens)
    clean = layer(x, logits)
    bad = tokens // 2
    x[bad, 7] = poison
    out, expected = layer(x, logits), layer.expected(x, logits)
    others = torch.arange(tokens, device="cuda") != bad
    assert torch.equal(out[others], clean[others])
    assert torch.equal(out[bad].isfinite(), expected[bad].isfinite())
    logits[bad, 2] = poison
    assert torch.equal(layer(x, logits)[others], clean[others])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens", TOKENS)
def test_ids_of_any_value(layer: Layer, tokens: int, dtype: torch.dtype):
    """What isn't an expert's number, in the ids or in the expert map, is not here; experts may be chosen twice."""
    x, logits = inputs(layer.shape, tokens)
    ids, gates = topk_softmax(logits, 4)
    ids = ids.contiguous()
    odd = [-1, -2, -32768, -65535, -65536, -(1 << 31), 16, 17, 256, 65536, 65538, (1 << 31) - 1]
    if dtype == torch.int64:
        odd += [1 << 32, (1 << 32) + 3, -(1 << 32), -(1 << 63), (1 << 63) - 1]
    places = torch.arange(ids.numel(), device="cuda") % 3 == 1
    ids.view(-1)[places] = torch.tensor(odd, device="cuda").repeat(tokens * 4)[: int(places.sum())]
    ids[0, 2:] = ids[0, 0]
    known = (ids >= 0) & (ids < 16)
    maps = {"all": None, "some": torch.arange(16, dtype=torch.int32, device="cuda")}
    maps["some"][::3] = torch.tensor([-1, -65536, 16, 65536, -(1 << 31), (1 << 31) - 1], device="cuda").int()
    for expert_map in maps.values():
        there = torch.arange(16, device="cuda") if expert_map is None else expert_map.clone()
        there[(there < 0) | (there >= 16)] = -1
        out = layer.backend.forward(layer.prepared, x, ids.to(dtype), gates, expert_map)
        right = reference(
            layer.weights,
            x,
            torch.where(known, ids, 0),
            gates * known,
            expert_map=there,
            activation_dtype=torch.bfloat16,
        )
        assert error(out, right) <= TOLERANCE if bool(right.any()) else not bool(out.any())


def test_sizes_beyond_reason():
    """Refused in one line; never a negative number of bytes."""
    for sizes in ((-1, 64, 64, 4, 2), (1 << 40, 64, 64, 4, 2), (8, 1 << 33, 64, 4, 2), (8, 64, 64, 1 << 32, 2)):
        with pytest.raises(RuntimeError, match="expected"):
            torch.ops.mxfp4_sm120.workspace_bytes(*sizes)
    with pytest.raises(ValueError, match="experts"):
        Native(replace(MoEShape(4, 4, 64, 64, 2), num_experts=0, local_experts=0))
