# SPDX-License-Identifier: Apache-2.0
"""The native kernels on a GPU, against float64 on the same packed weights.

`-k small_shapes` are the shapes for compute-sanitizer: every kernel, few blocks.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.gpu.native_layer import TOLERANCE, Layer, error, inputs, real_weights, run_op, why_not
from tests.support import layers
from vllm_mxfp4_sm120.backends.native import Native, library
from vllm_mxfp4_sm120.backends.native.layout import MAX_SCALE, MIN_SCALE
from vllm_mxfp4_sm120.moe import Activation, MoEShape, MoEWeights, reference, topk_softmax

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

# Around every change of kernel: all tokens as columns, gathered by expert, tiles of 24 to 144 tokens an expert.
TOKENS = (1, 2, 3, 8, 9, 16, 17, 33, 64, 150, 513)


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer(MoEShape(16, 16, 736, 672, 4))


# ---- right answers --------------------------------------------------------------------------------------------------

SMALL = (
    MoEShape(1, 1, 32, 32, 1),
    MoEShape(4, 4, 64, 96, 2, has_bias=False),
    MoEShape(8, 8, 160, 64, 8),
    MoEShape(5, 5, 96, 32, 3, activation=Activation.SILU),
)
LARGE = (
    MoEShape(32, 32, 2880, 2880, 4),  # gpt-oss-20b
    MoEShape(32, 32, 2880, 1440, 4),  # its half, TP2
    MoEShape(16, 16, 2880, 736, 4),  # TP4
    MoEShape(16, 16, 2880, 672, 4),
    MoEShape(128, 128, 736, 672, 4),
    MoEShape(256, 256, 256, 128, 8, has_bias=False),
    MoEShape(4, 4, 4096, 1440, 2, activation=Activation.SILU),
    MoEShape(2, 2, 7168, 4096, 1),
)


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 8, 9, 16, 17, 40, 130])
def test_small_shapes(shape: MoEShape, tokens: int):
    layer = Layer(shape)
    x, logits = inputs(shape, tokens)
    if tokens:
        layer.check(x, logits)
        layer.check(x, logits.bfloat16())
    else:
        assert layer(x, logits).shape == (0, shape.hidden_size)


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_shapes_of_models(shape: MoEShape):
    layer = Layer(shape)
    for tokens in TOKENS:
        layer.check(*inputs(shape, tokens))


def test_tokens_of_a_long_prompt():
    layer = Layer(MoEShape(32, 32, 2880, 2880, 4))
    layer.check(*inputs(layer.shape, 4096))


def test_many_tokens_in_parts(layer: Layer):
    x, logits = inputs(layer.shape, library.limits().tokens + 300)
    ids, gates = topk_softmax(logits, layer.shape.top_k)
    layer.check(x, logits)
    assert error(layer.backend.forward(layer.prepared, x, ids, gates), layer.expected(x, logits)) <= TOLERANCE


def test_given_experts_are_those_that_logits_choose(layer: Layer):
    for tokens in TOKENS:
        x, logits = inputs(layer.shape, tokens)
        ids, gates = topk_softmax(logits, layer.shape.top_k)
        for dtype in (torch.int32, torch.int64):
            out = layer.backend.forward(layer.prepared, x, ids.to(dtype), gates)
            assert error(out, layer.expected(x, logits)) <= TOLERANCE


@pytest.mark.parametrize("tokens", [5, 150])
def test_odd_logits(layer: Layer, tokens: int):
    """Masked experts, huge and tiny logits: the k largest all the same, and a softmax that doesn't overflow."""
    x, logits = inputs(layer.shape, tokens)
    logits[:, ::3] = -torch.inf
    layer.check(x, logits)
    layer.check(x, logits * 1e4)
    layer.check(x, logits - 1e30)


@pytest.mark.parametrize("tokens", [8, 64, 513])
def test_skewed_routing(layer: Layer, tokens: int):
    """Half of all tokens on the same experts; all tokens on the same; an expert for every token."""
    x, logits = inputs(layer.shape, tokens)
    logits[: tokens // 2, 2:4] += 100
    layer.check(x, logits)
    logits[:, 5:9] += 1000
    layer.check(x, logits)
    ids = torch.arange(tokens * layer.shape.top_k, device="cuda").view(tokens, -1) % layer.shape.num_experts
    gates = torch.rand(tokens, layer.shape.top_k, device="cuda")
    out = layer.backend.forward(layer.prepared, x, ids, gates)
    assert error(out, reference(layer.weights, x, ids, gates, activation_dtype=torch.bfloat16)) <= TOLERANCE


@pytest.mark.parametrize("tokens", [1, 8, 16, 64, 300])
@pytest.mark.parametrize("scales", ["whole range", "smallest", "largest", "equal", "alternating", "zero rows"])
def test_scales(scales: str, tokens: int):
    shape = MoEShape(8, 8, 320, 352, 2, has_bias=False)
    low, high = {"whole range": (MIN_SCALE, MAX_SCALE), "equal": (120, 120), "alternating": (107, 137)}.get(
        scales, (118, 124)
    )
    weights = layers.random_weights(shape, "cuda", scales=(low, high))
    if scales == "alternating":
        for scale in (weights.w13_scale, weights.w2_scale):
            scale[..., ::2], scale[..., 1::2] = 127 - 20, 127 + 10
    if scales == "zero rows":
        weights.w13[:, ::3] = 0
        weights.w13_scale[:, ::3] = 0  # outside of what the kernels multiply with, but there is nothing to multiply
        weights.w2[:, 1::3] = 0x88
    if scales in ("smallest", "largest"):
        # In w2 alone: in both, the smallest would leave gates of zero, and the largest saturate all of them.
        weights.w2_scale.fill_(MIN_SCALE if scales == "smallest" else MAX_SCALE)
    Layer(shape, weights).check(*inputs(shape, tokens))


def test_every_configuration_gives_the_same_answer(layer: Layer):
    """The table's other entries are there to be tuned to; each must be right wherever it agrees to run."""
    table = library.configurations()
    ran = set()
    for tokens in (3, 8, 50, 150):
        x, logits = inputs(layer.shape, tokens)
        values = tokens * layer.shape.top_k * max(layer.shape.hidden_size, layer.shape.intermediate_size)
        for config, entry in enumerate(table):
            if tokens > entry.tokens or values > entry.values:
                with pytest.raises(RuntimeError, match=f"config {entry.name} takes up to"):
                    run_op(layer, x, logits, config=config)
                continue
            ran.add(config)
            out = run_op(layer, x, logits, config=config)
            assert error(out, layer.expected(x, logits)) <= TOLERANCE, f"{entry.name}, {tokens} tokens"
    assert ran == set(range(len(table)))


# ---- a token's answer is its own ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [2, 8, 16, 33, 150])
def test_other_tokens_values_do_not_matter(layer: Layer, tokens: int):
    x, logits = inputs(layer.shape, tokens)
    first = layer(x, logits)
    x[1:] = torch.randn_like(x[1:]) * 50
    assert torch.equal(layer(x, logits)[0], first[0])


@pytest.mark.parametrize("tokens", [1, 8, 16, 64, 513])
def test_the_same_bits_a_thousand_times(layer: Layer, tokens: int):
    x, logits = inputs(layer.shape, tokens)
    first = layer(x, logits)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        different += (layer(x, logits) != first).sum()
    assert int(different) == 0


# ---- expert parallel ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 8, 16, 33, 150])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_sum_to_the_whole(layer: Layer, tokens: int, ranks: int):
    x, logits = inputs(layer.shape, tokens)
    ids, gates = topk_softmax(logits, layer.shape.top_k)
    total = torch.zeros(x.shape, dtype=torch.float64, device="cuda")
    for rank in range(ranks):
        # Not in order, as a load balancer may place them.
        mine = torch.arange(rank, layer.shape.num_experts, ranks, device="cuda").flip(0)
        expert_map = torch.full((layer.shape.num_experts,), -1, dtype=torch.int32, device="cuda")
        expert_map[mine] = torch.arange(len(mine), dtype=torch.int32, device="cuda")
        weights = MoEWeights(**{name: None if t is None else t[mine] for name, t in vars(layer.weights).items()})
        part = Native(replace(layer.shape, local_experts=len(mine)))
        prepared = part.prepare(weights.clone())
        expected = reference(weights, x, ids, gates, expert_map=expert_map, activation_dtype=torch.bfloat16)
        for out in (
            part.forward_logits(prepared, x, logits, expert_map),
            part.forward(prepared, x, ids, gates, expert_map),
        ):
            away = expected.abs().amax(1) == 0
            assert bool((out[away] == 0).all())
            if not bool(away.all()):
                assert error(out, expected) <= TOLERANCE
        total += out
    assert error(total, layer.expected(x, logits)) <= 1.5 * TOLERANCE


def test_a_rank_without_any_chosen_expert_gives_zeros(layer: Layer):
    shape = replace(layer.shape, local_experts=2)
    part = Native(shape)
    prepared = part.prepare(real_weights(shape))
    expert_map = torch.full((shape.num_experts,), -1, dtype=torch.int32, device="cuda")
    expert_map[:2] = torch.arange(2, dtype=torch.int32, device="cuda")
    for tokens in (1, 8, 150):
        x, logits = inputs(shape, tokens)
        logits[:, :2] = -torch.inf
        torch.full_like(x, 7)  # what the allocator hands out next is not zero
        assert bool((part.forward_logits(prepared, x, logits, expert_map) == 0).all())


def test_a_token_gets_the_same_bits_whatever_others_there_are():
    """Of gpt-oss-20b's layer, with one kernel for all calls: alone, with a few, with many, in more than one launch."""
    layer = Layer(MoEShape(32, 32, 2880, 2880, 4))
    assert layer.backend.fix_kernel()
    x, logits = inputs(layer.shape, 9000)
    together = layer(x, logits)
    for some in (slice(0, 1), slice(1, 9), slice(9, 90), slice(90, 700), slice(8000, 9000)):
        assert torch.equal(layer(x[some], logits[some]), together[some]), some
