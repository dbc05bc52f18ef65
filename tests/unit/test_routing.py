# SPDX-License-Identifier: Apache-2.0
"""Routing, grouping, and the exact words for what can't be routed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.layers import random_weights
from vllm_mxfp4_sm120.backends.tiled import Tiled
from vllm_mxfp4_sm120.moe import MoEShape, topk_softmax
from vllm_mxfp4_sm120.routing import Routing, Segment, local_ids

IDS = torch.tensor([[2, 0], [1, 2], [2, 2]])
GATES = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]])


def same(routing: Routing, dtype=torch.float32) -> None:
    """Is it IDS and GATES."""
    assert routing.token.dtype == routing.expert.dtype == torch.int64
    assert routing.gate.dtype == dtype
    assert routing.token.tolist() == [0, 0, 1, 1, 2, 2]
    assert routing.expert.tolist() == [2, 0, 1, 2, 2, 2]
    assert routing.gate.tolist() == [0.75, 0.25, 0.5, 0.5, 1.0, 0.0]
    assert routing.num_tokens == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("integer", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_any_integers_and_floats_give_the_same_routing(integer, dtype):
    same(Routing.from_topk(IDS.to(integer), GATES.to(dtype)), dtype)


def test_views_that_are_not_contiguous():
    wide_ids = torch.stack((IDS, IDS + 9), dim=-1).transpose(0, 1).contiguous().transpose(0, 1)
    wide_gates = torch.stack((GATES, GATES + 9), dim=-1)
    assert not wide_ids[..., 0].is_contiguous()
    same(Routing.from_topk(wide_ids[..., 0], wide_gates[..., 0]))


def test_zero_tokens():
    routing = Routing.from_topk(torch.zeros(0, 4, dtype=torch.int32), torch.zeros(0, 4))
    assert routing.num_tokens == 0 and routing.token.numel() == 0
    assert routing.group().segments() == []


def test_one_token_and_all_on_one_expert():
    one = Routing.from_topk(torch.tensor([[5, 1]]), torch.tensor([[0.9, 0.1]])).group()
    assert one.segments() == [Segment(1, 0, 1), Segment(5, 1, 2)]
    everything = Routing.from_topk(torch.full((6, 1), 3), torch.ones(6, 1)).group()
    assert everything.segments() == [Segment(3, 0, 6)]
    assert everything.order.tolist() == list(range(6))


@settings(max_examples=50)
@given(st.integers(0, 12), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_groups_are_contiguous_stable_and_complete(tokens, top_k, experts, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, experts, (tokens, top_k), generator=generator)  # repeated experts, and some not here
    gates = torch.rand(tokens, top_k, generator=generator)
    routing = Routing.from_topk(ids, gates)
    grouped = routing.group()
    expected = sorted(range(tokens * top_k), key=lambda pair: int(ids.flatten()[pair]))  # Python's sort is stable
    assert grouped.order.tolist() == expected
    assert torch.equal(grouped.routing.gate, gates.flatten()[grouped.order])
    segments = grouped.segments()
    assert [segment.start for segment in segments] == [0, *(segment.stop for segment in segments)][: len(segments)]
    assert sum(segment.stop - segment.start for segment in segments) == tokens * top_k
    assert [segment.expert for segment in segments] == sorted(set(ids.flatten().tolist()))
    for segment in segments:
        assert set(grouped.routing.expert[segment.start : segment.stop].tolist()) == {segment.expert}


def refuse(call, *args) -> str:
    with pytest.raises(RuntimeError) as error:
        call(*args)
    return str(error.value)


def test_shapes_that_do_not_match():
    assert refuse(Routing.from_topk, IDS, GATES[:2]) == (
        "routing: experts are int64 [3, 2] and gates float32 [2, 2], expected both [tokens, k]; "
        "give one gate for each chosen expert"
    )
    assert refuse(Routing.from_topk, IDS.flatten(), GATES.flatten()) == (
        "routing: experts are int64 [6] and gates float32 [6], expected both [tokens, k]; "
        "give one gate for each chosen expert"
    )


def test_swapped_ids_and_gates():
    assert refuse(Routing.from_topk, GATES, IDS) == (
        "routing: experts are float32 [3, 2], expected integers; are ids and gates swapped?"
    )
    assert refuse(Routing.from_topk, IDS, IDS) == (
        "routing: gates are int64 [3, 2], expected floats; are ids and gates swapped?"
    )


def test_gates_are_checked():
    gates = GATES.clone()
    gates[1, 0] = 0.25
    Routing.from_topk(IDS, GATES).check_gates()
    Routing.from_topk(IDS[:0], GATES[:0]).check_gates()
    assert refuse(Routing.from_topk(IDS, gates).check_gates) == (
        "routing: the gates of token 1 sum to 0.75 (1 of 3 tokens are off), expected 1 within 0.01; "
        "normalise over the chosen experts"
    )
    gates[2] = float("nan")
    assert refuse(Routing.from_topk(IDS, gates).check_gates).startswith(
        "routing: the gates of token 1 sum to 0.75 (2 of 3 tokens are off)"
    )


def test_a_setting_checks_the_gates_of_every_layer(monkeypatch):
    shape = MoEShape(4, 4, 32, 32, 2)
    layer = Tiled(shape)
    prepared, x = layer.prepare(random_weights(shape, "cpu")), torch.zeros(3, 32, dtype=torch.bfloat16)
    layer.forward(prepared, x, IDS, GATES / 2)
    monkeypatch.setenv("MXFP4_SM120_VALIDATE_GATE", "1")
    layer.forward(prepared, x, IDS, GATES)
    assert "the gates of token 0 sum to 0.5" in refuse(layer.forward, prepared, x, IDS, GATES / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_gates_pass_the_check(dtype):
    ids, gates = topk_softmax(torch.randn(500, 32, generator=torch.Generator().manual_seed(0)), 4)
    Routing.from_topk(ids, gates.to(dtype)).check_gates()


ANY_IDS = [0, 3, 4, 7, 8, -1, -8, -65536, -65535, 65536, 2**31 - 1, -(2**31)]
EXPERT_MAP = torch.tensor([-1, 0, -1, 1, -1, 2, 9, -7], dtype=torch.int32)  # the last two: no local expert either


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_that_no_expert_has_are_not_here(dtype):
    ids = torch.tensor([ANY_IDS], dtype=dtype)
    assert local_ids(ids, 8).tolist() == [[i if 0 <= i < 8 else -1 for i in ANY_IDS]]
    expected = [{3: 1}.get(i, -1) for i in ANY_IDS]
    assert local_ids(ids, 3, EXPERT_MAP).tolist() == [expected]
    assert local_ids(torch.tensor([-(2**63), 2**63 - 1, 2**32]), 8).tolist() == [-1, -1, -1]
    with pytest.raises(RuntimeError, match="expected integers"):
        local_ids(torch.zeros(2, 2), 8)
