# SPDX-License-Identifier: Apache-2.0
"""Routing out of every form, grouping, and the exact words for what can't be routed."""

from collections import namedtuple
from enum import IntEnum
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mxfp4_sm120.routing import ACCEPTED, Routing, Segment, local_ids

IDS = torch.tensor([[2, 0], [1, 2], [2, 2]])
GATES = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]])


class Format(IntEnum):
    STANDARD = 1
    BYPASSED = 3


# The shapes that engines give to what their top-k hands out.
Standard = namedtuple("Standard", "topk_weights topk_ids router_logits format")
Bypassed = namedtuple("Bypassed", "hidden_states router_logits topk_config format")


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
def test_every_form_gives_the_same_routing(integer, dtype):
    ids, gates = IDS.to(integer), GATES.to(dtype)
    tokens = torch.tensor([0, 0, 1, 1, 2, 2]).to(integer)
    same(Routing.extract((ids, gates)), dtype)
    same(Routing.extract([ids, gates]), dtype)
    same(Routing.extract(SimpleNamespace(topk_ids=ids, topk_weights=gates)), dtype)
    same(Routing.extract({"topk_ids": ids, "topk_weights": gates}), dtype)
    same(Routing.extract(Standard(gates, ids, torch.randn(3, 4), Format.STANDARD)), dtype)
    same(Routing.extract({"token_ids": tokens, "expert_ids": ids.flatten(), "gates": gates.flatten()}), dtype)
    same(Routing.extract(Routing.from_topk(ids, gates)), dtype)


@pytest.mark.parametrize("form", [Format.BYPASSED, "bypassed", "BYPASSED"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_were_not_routed_are_routed_here(form, dtype):
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    routing = Routing.extract(Bypassed(torch.zeros(5, 32), logits, SimpleNamespace(top_k=3), form))
    order = logits.float().argsort(dim=1, descending=True)[:, :3]
    assert routing.expert.view(5, 3).tolist() == order.tolist()
    chosen = logits.double().gather(1, order).exp()
    expected = chosen / chosen.sum(1, keepdim=True)
    assert routing.gate.dtype == dtype
    torch.testing.assert_close(routing.gate.view(5, 3).double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=0)
    direct = Routing.extract({"format": form, "router_logits": logits, "top_k": 3})
    assert torch.equal(direct.expert, routing.expert) and torch.equal(direct.gate, routing.gate)


def test_pairs_in_any_order_and_tokens_without_an_expert():
    given_pairs = {
        "token_ids": torch.tensor([4, 0, 4]),
        "expert_ids": torch.tensor([1, 1, 0]),
        "gates": torch.tensor([0.5, 1.0, 0.5]),
    }
    assert Routing.extract(given_pairs).num_tokens == 5
    assert Routing.extract(given_pairs | {"num_tokens": 7}).num_tokens == 7
    grouped = Routing.extract(given_pairs).group()
    assert grouped.routing.token.tolist() == [4, 4, 0]
    assert grouped.segments() == [Segment(0, 0, 1), Segment(1, 1, 3)]


def test_views_that_are_not_contiguous():
    wide_ids = torch.stack((IDS, IDS + 9), dim=-1).transpose(0, 1).contiguous().transpose(0, 1)
    wide_gates = torch.stack((GATES, GATES + 9), dim=-1)
    assert not wide_ids[..., 0].is_contiguous()
    same(Routing.extract((wide_ids[..., 0], wide_gates[..., 0])))


def test_zero_tokens():
    routing = Routing.extract((torch.zeros(0, 4, dtype=torch.int32), torch.zeros(0, 4)))
    assert routing.num_tokens == 0 and routing.token.numel() == 0
    assert routing.group().segments() == []
    empty = torch.zeros(0, dtype=torch.int64)
    pairs = Routing.extract({"token_ids": empty, "expert_ids": empty, "gates": torch.zeros(0)})
    assert pairs.num_tokens == 0 and pairs.group().segments() == []
    logits = Routing.extract({"format": "bypassed", "router_logits": torch.zeros(0, 8), "top_k": 2})
    assert logits.num_tokens == 0


def test_one_token_and_all_on_one_expert():
    one = Routing.from_topk(torch.tensor([[5, 1]]), torch.tensor([[0.9, 0.1]])).group()
    assert one.segments() == [Segment(1, 0, 1), Segment(5, 1, 2)]
    everything = Routing.from_topk(torch.full((6, 1), 3), torch.ones(6, 1)).group()
    assert everything.segments() == [Segment(3, 0, 6)]
    assert everything.order.tolist() == list(range(6))


@settings(max_examples=50, deadline=None)
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


@pytest.mark.parametrize(
    ("given_", "described"),
    [
        (None, "NoneType"),
        (torch.zeros(2, 3), "float32 [2, 3]"),
        ("bypassed", "str"),
        ((IDS,), "a tuple of (int64 [3, 2])"),
        ((IDS, GATES, GATES), "a tuple of (int64 [3, 2], float32 [3, 2], float32 [3, 2])"),
        ({"topk_ids": IDS}, "dict with topk_ids"),
        ({"expert_ids": IDS, "gates": GATES}, "dict with expert_ids, gates"),
        (SimpleNamespace(router_logits=GATES), "SimpleNamespace with router_logits"),
        ({"router_logits": GATES, "format": "bypassed"}, "dict with router_logits, format in format 'bypassed'"),
        (
            Bypassed(GATES, None, SimpleNamespace(top_k=2), Format.BYPASSED),
            "Bypassed with hidden_states, router_logits, topk_config, format in format 'BYPASSED'",
        ),
        ({"format": "triton", "routing_data": 1}, "dict with format, routing_data in format 'triton'"),
    ],
)
def test_anything_else_is_refused(given_, described):
    assert refuse(Routing.extract, given_) == f"routing: given {described}, expected {ACCEPTED}"


def test_shapes_that_do_not_match():
    assert refuse(Routing.extract, (IDS, GATES[:2])) == (
        "routing: experts are int64 [3, 2] and gates float32 [2, 2], expected both [tokens, k]; "
        "give one gate for each chosen expert"
    )
    assert refuse(Routing.extract, (IDS.flatten(), GATES.flatten())) == (
        "routing: experts are int64 [6] and gates float32 [6], expected both [tokens, k]; "
        "give one gate for each chosen expert"
    )
    assert refuse(Routing.from_pairs, torch.arange(6), IDS.flatten(), GATES[0]) == (
        "routing: tokens are int64 [6], experts int64 [6] and gates float32 [2], expected all [pairs]; "
        "give one of each for every pair"
    )


def test_swapped_ids_and_gates():
    assert refuse(Routing.extract, (GATES, IDS)) == (
        "routing: experts are float32 [6], expected integers; are ids and gates swapped?"
    )
    assert refuse(Routing.extract, (IDS, IDS)) == (
        "routing: gates are int64 [6], expected floats; are ids and gates swapped?"
    )


def test_logits_that_can_not_be_routed():
    assert refuse(Routing.from_logits, IDS, 1) == (
        "routing: router_logits are int64 [3, 2], expected floats [tokens, experts]"
    )
    for top_k in (0, 3):
        assert refuse(Routing.from_logits, GATES, top_k) == (
            f"routing: top_k is {top_k}, expected 1 to 2, the number of experts"
        )


def test_gates_are_checked_on_request(monkeypatch):
    gates = GATES.clone()
    gates[1, 0] = 0.25
    Routing.from_topk(IDS, gates)
    monkeypatch.setenv("MXFP4_SM120_VALIDATE_GATE", "1")
    Routing.from_topk(IDS, GATES)
    Routing.from_topk(IDS[:0], GATES[:0])
    assert refuse(Routing.from_topk, IDS, gates) == (
        "routing: the gates of token 1 sum to 0.75 (1 of 3 tokens are off), expected 1 within 0.01; "
        "normalise over the chosen experts"
    )
    gates[2] = float("nan")
    assert refuse(Routing.from_topk, IDS, gates).startswith(
        "routing: the gates of token 1 sum to 0.75 (2 of 3 tokens are off)"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_gates_pass_the_check(monkeypatch, dtype):
    monkeypatch.setenv("MXFP4_SM120_VALIDATE_GATE", "1")
    Routing.from_logits(torch.randn(500, 32, generator=torch.Generator().manual_seed(0)).to(dtype), 4)


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
