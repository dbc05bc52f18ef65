# SPDX-License-Identifier: Apache-2.0
"""benchmarks/fp4_speed.py: the model against figures worked out by hand."""

from __future__ import annotations

import fp4_speed
import pytest


def tensor_microseconds(card: fp4_speed.Card, kernel: fp4_speed.Kernel, tokens: int) -> float:
    return fp4_speed.over_a_layer(card, kernel, tokens, lambda tile: tile.tensor)


def test_many_tokens_take_as_long_as_their_products() -> None:
    """8192 tokens, four experts each, 3 x 2880 x 2880 weights an expert, 2 FLOP a weight and term: 1.63e12 a term."""
    flop = 8192 * 4 * 3 * 2880**2 * 2
    card = fp4_speed.CARDS[0]
    assert tensor_microseconds(card, fp4_speed.bf16_kernel(1024), 8192) == pytest.approx(flop / 209.5e6, rel=0.02)
    for terms in (1, 2, 3, 4):
        found = tensor_microseconds(card, fp4_speed.fp4_kernel(terms), 8192)
        assert found == pytest.approx(terms * flop / 1676e6, rel=0.02)


def test_instructions_take_a_cycle_each_of_a_scheduler() -> None:
    """Two warps a scheduler, 45 steps: four terms' products are 16 cycles each, all other instructions one."""
    count = fp4_speed.counted("4 terms", "sm_120")
    tile = fp4_speed.work_tile(fp4_speed.CARDS[0], fp4_speed.fp4_kernel(4), 128, down=0)
    assert tile.tensor == 2 * 45 * 128 * 16
    assert tile.issue == 2 * 45 * (128 + count["beside them"]) and tile.after == 2 * count["after gate_up"]
    assert tile.with_blocks(1) == tile.tensor + tile.after
    assert tile.with_blocks(2) == tile.tensor  # the other block's products hide the rest
    bound = fp4_speed.Cycles(tensor=1, issue=5, after=2)
    assert bound.with_blocks(1) == bound.with_blocks(2) == 7
    few = fp4_speed.work_tile(fp4_speed.CARDS[0], fp4_speed.fp4_kernel(4), 32, down=1)
    assert few.tensor == tile.tensor / 4
    assert few.issue == 2 * 45 * (32 + count["beside those"]) and few.after == 2 * count["after down"] / 4


@pytest.mark.parametrize("card", fp4_speed.CARDS, ids=lambda card: card.name)
def test_few_tokens_take_as_long_as_reading_the_weights(card: fp4_speed.Card) -> None:
    weights = 32 * 3 * 2880**2 * 17 / 32
    found = fp4_speed.microseconds(card, fp4_speed.fp4_kernel(1), 64)
    assert found == pytest.approx(weights / (card.terabytes * 0.86e6), rel=0.03)


def test_the_rates_are_the_published_ones() -> None:
    """TFLOP/s."""
    rates = {card.name: (card.multiprocessors * card.gigahertz / 1e3) for card in (*fp4_speed.CARDS, fp4_speed.H100)}
    assert rates["RTX 5090"] * 512 == pytest.approx(209, rel=0.01)
    assert rates["RTX 5090"] * 4096 == pytest.approx(1676, rel=0.01)
    assert rates["RTX PRO 6000"] * 1024 == pytest.approx(504, rel=0.01)
    assert rates["RTX PRO 6000"] * 4096 == pytest.approx(2015, rel=0.01)
    assert rates["H100"] * 4096 == pytest.approx(989, rel=0.01)


def test_an_experts_tokens_are_rounded_up() -> None:
    """1032 tokens are 129 an expert: a block of 128 and a tail, of 8 for BF16 and of 32 for FP4."""
    card = fp4_speed.CARDS[0]
    kernel = fp4_speed.fp4_kernel(1)
    full, more = (tensor_microseconds(card, kernel, tokens) for tokens in (1024, 1032))
    assert more - full == pytest.approx(32 / 1676e6 * 32 * 3 * 2880**2 * 2, rel=0.01)


@pytest.mark.parametrize(("each", "tokens", "rows"), [(64, 80, 128), (128, 144, 256), (1024, 144, 256)])
def test_bf16_kernels_are_those_of_the_rule(each: float, tokens: int, rows: int) -> None:
    kernel = fp4_speed.bf16_kernel(each)
    assert (kernel.tokens, kernel.rows, kernel.bf16) == (tokens, rows, True)
