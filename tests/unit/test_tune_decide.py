# SPDX-License-Identifier: Apache-2.0
"""What tune concludes from made-up times: no kernel is taken that isn't faster beyond doubt."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tune import RULE, SHIPPED, size

from vllm_mxfp4_sm120.backends import tuning
from vllm_mxfp4_sm120.backends.tuning import Bound
from vllm_mxfp4_sm120.bench import models
from vllm_mxfp4_sm120.tune.decide import GAIN, decide, gain, serving, tidied
from vllm_mxfp4_sm120.tune.sizes import Size, around


def rounds(*microseconds: float) -> list[float]:
    """Five rounds of each of these times, a little noise in them."""
    return [time * (1 + 0.004 * (i % 3 - 1)) for time in microseconds for i in range(5 // len(microseconds))]


def times(**kernels: dict[int, float]) -> dict[Size, dict[str, list[float]]]:
    """By kernel and tokens."""
    found: dict[Size, dict[str, list[float]]] = {}
    for kernel, row in kernels.items():
        for tokens, time in row.items():
            found.setdefault(size(tokens), {})[kernel] = rounds(time)
    return found


FLAT = dict.fromkeys((4, 6, 8, 9, 12, 100, 128, 136, 200), 100.0)


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        pytest.param({}, RULE, id="all the same"),
        pytest.param({"a": {9: 98.5, 12: 98.5}}, RULE, id="too little gained"),
        pytest.param({"a": {9: 90, 12: 90}}, (Bound("a", tokens=12), *RULE[1:]), id="outward"),
        pytest.param({"a": {9: 90}}, (Bound("a", tokens=9), *RULE[1:]), id="as far as it gains"),
        pytest.param({"b": {6: 90, 8: 90}}, (Bound("a", tokens=5), *RULE[1:]), id="inward"),
        pytest.param({"b": {6: 90}}, RULE, id="one size alone is no range"),
        pytest.param({"b": {4: 90, 6: 90, 8: 90}}, RULE[1:], id="never the best"),
        pytest.param(
            {"c": {128: 90, 100: 90}}, (RULE[0], Bound("b", tokens_per_expert=99 / 8), RULE[2]), id="per expert"
        ),
        pytest.param({"b": {136: 90, 200: 90}}, (RULE[0], Bound("b", tokens_per_expert=25), RULE[2]), id="up to there"),
        pytest.param({"d": {136: 90, 200: 90}}, (*RULE[:2], Bound("d")), id="a new kernel for a line"),
        pytest.param(
            {"d": {9: 90, 12: 90}},
            (RULE[0], Bound("b", tokens_per_expert=1.0), Bound("d", tokens_per_expert=1.5), *RULE[1:]),
            id="a new kernel for a part of it",
        ),
    ],
)
def test_borders_move_only_where_it_pays(changed: dict, rule: tuning.Rule) -> None:
    found = times(**{kernel: FLAT | changed.get(kernel, {}) for kernel in "abcd"})
    decision = decide(RULE, found)
    assert decision.rule == rule
    moved = {each.size.tokens for each in decision.changes}
    assert moved == {s.tokens for s in found if serving(rule, s, found[s]) != serving(RULE, s, found[s])}
    assert all(each.gain >= GAIN for each in decision.changes)


def test_faster_in_every_round_or_not_at_all() -> None:
    mostly = {"a": [90, 90, 90, 90, 101], "b": [100] * 5, "c": [100] * 5}
    assert decide(RULE, {size(9): mostly}).rule == RULE and gain(mostly, "a", "b") == 1.0
    always = mostly | {"a": [90] * 5}
    assert decide(RULE, {size(9): always}).rule[0] == Bound("a", tokens=9)


def test_a_kernel_that_cannot_take_a_size() -> None:
    """Nothing is given to it there; and where today's can't, the next line's is what counts, as in the library."""
    found = times(a={4: 100, 8: 100}, b={4: 120, 8: 120, 9: 100, 30: 100}, c={4: 120, 8: 120, 9: 90, 30: 90})
    assert serving((Bound("a", tokens=30), *RULE[1:]), size(9), found[size(9)]) == "b"
    assert decide(RULE, found).rule == (Bound("a", tokens=8), Bound("c"))
    with pytest.raises(ValueError, match="the rule has no kernel for 30 tokens of 20b, expected one of b"):
        serving((Bound("a"),), size(30), {"b": 1})


def test_two_models_share_a_rule() -> None:
    """What one of them gains by isn't forced on the other, which has as many tokens an expert."""
    wide = Size("120b", 48, 128, 4)  # 1.5 an expert, as 12 tokens of 20b
    found = times(b=FLAT, c=FLAT | {9: 90, 12: 90}, a=FLAT)
    found[wide] = {"b": rounds(90), "c": rounds(100)}
    rule = decide(RULE, found).rule
    assert serving(rule, wide, found[wide]) == "b" and serving(rule, size(12), found[size(12)]) == "c"
    assert rule == (RULE[0], Bound("c", tokens=12, tokens_per_expert=16), *RULE[1:])


def test_lines_that_do_nothing_are_left_out() -> None:
    dead = (Bound("a", tokens=8), Bound("b", tokens=4), Bound("c", tokens_per_expert=3), Bound("c"))
    assert tidied(dead) == (Bound("a", tokens=8), Bound("c"))
    assert tidied(SHIPPED) == SHIPPED


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_nothing_gets_slower_whatever_is_measured(data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.sampled_from(list(FLAT)), min_size=2, max_size=6, unique=True))
    time = st.floats(80, 120)
    found = {
        size(each): {kernel: data.draw(st.lists(time, min_size=3, max_size=3)) for kernel in "abcd"} for each in tokens
    }
    decision = decide(RULE, found)
    assert decision.rule[-1] == Bound(decision.rule[-1].kernel)
    for each, row in found.items():
        before, after = serving(RULE, each, row), serving(decision.rule, each, row)
        assert after == before or all(new < old for new, old in zip(row[after], row[before], strict=True))
        assert after == before or gain(row, after, before) >= GAIN


def test_sizes_lie_on_both_sides_of_each_border() -> None:
    shape = models.model("20b").experts
    tokens = [each.tokens for each in around(SHIPPED, "20b", shape, 8192)]
    for bound in SHIPPED[:-1]:
        border = min(bound.tokens, bound.tokens_per_expert * 8)
        assert {border, border + 1} <= set(tokens), bound
        assert any(0.6 * border < each < 0.9 * border for each in tokens)
    assert tokens[:3] == [1, 2, 4] and tokens[-1] == 8192 and len(tokens) < 80
