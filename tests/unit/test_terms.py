# SPDX-License-Identifier: Apache-2.0
"""Activations as FP4 terms, against a second implementation: numbers from a table, scales by search, all in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vllm_mxfp4_sm120 import mxfp4, terms

GRID = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
LARGEST = torch.finfo(torch.bfloat16).max


def split_slowly(block: np.ndarray, count: int) -> tuple[list[list[int]], list[int]]:
    """32 finite values -> `count` times the 32 codes and the scale. Value by value, by looking for what is nearest."""
    rest, codes, scales = [float(value) for value in block], [], []
    for _ in range(count):
        largest = max(abs(value) for value in rest)
        scale = next((s for s in range(253) if largest <= 7 * 2.0 ** (s - 127)), 252)
        unit = 2.0 ** (scale - 127)
        chosen = []
        for value in rest:
            # Of equally near values the one with the even code; beyond 6 that is 6, for nothing is nearer.
            code = min(range(8), key=lambda c: (abs(abs(value) / unit - GRID[c]), c % 2))
            chosen.append(code + 8 * (np.signbit(value)))
        rest = [v - np.copysign(GRID[c % 8], v) * unit for v, c in zip(rest, chosen, strict=True)]
        codes.append(chosen)
        scales.append(scale)
    return codes, scales


def assert_same(x: torch.Tensor, count: int = 4) -> None:
    """x [blocks, 32], finite."""
    codes, scales = terms.split(x, count)
    codes = mxfp4.unpack(codes)
    for row, block in enumerate(x.double().numpy()):
        slow_codes, slow_scales = split_slowly(block, count)
        assert scales[:, row, 0].tolist() == slow_scales, block
        assert codes[:, row].tolist() == slow_codes, block


def random_blocks(seed: int, dtype: torch.dtype, spread: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values, exponents = torch.randn(2, 40, 32, generator=generator, dtype=torch.float64).unbind()
    return (values * (exponents * spread).exp2()).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spread", [0, 3, 12])
def test_the_same_bits_as_a_second_implementation(dtype: torch.dtype, spread: float) -> None:
    assert_same(random_blocks(0, dtype, spread))


finite = hnp.arrays(np.uint32, (1, 32), elements=st.integers(0, 2**32 - 1)).map(lambda bits: bits.view(np.float32))


@settings(max_examples=60, deadline=None)
@given(finite.filter(lambda block: bool(np.isfinite(block).all())), st.booleans())
def test_the_same_bits_for_any_bits(block: np.ndarray, as_bf16: bool) -> None:
    x = torch.from_numpy(block.copy())
    x = (x.view(torch.int32) & -0x10000).view(torch.float32).bfloat16() if as_bf16 else x
    assert_same(x)


def with_values(**at: float) -> torch.Tensor:
    block = torch.zeros(32)
    for position, value in at.items():
        block[int(position[1:])] = value
    return block


TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
BLOCKS = {
    "zeros": torch.zeros(32),
    "negative zeros": -torch.zeros(32),
    "each tie and its neighbours": torch.tensor([7.0, *(t + d for t in TIES for d in (-0.01, 0, 0.01)), *[0.0] * 10]),
    "beyond 6": torch.tensor([6.0, -6.5, 6.99, -7.0] * 8),
    "one value 2^20 above its neighbours": torch.cat((torch.tensor([1.3 * 2**20]), torch.linspace(-1, 1, 31))),
    "one value 2^200 above another": with_values(_3=2.0**100, _7=-(2.0**-100)),
    "subnormals of BF16": torch.arange(-16, 16) * 2.0**-133,
    "subnormals of float32": torch.arange(-16, 16) * 2.0**-149,
    "smallest normal numbers": torch.arange(-16, 16) * 2.0**-126,
    "largest BF16": torch.full((32,), LARGEST),
    "largest BF16 beside the smallest": with_values(_0=-LARGEST, _1=2.0**-133, _2=LARGEST / 3),
    "largest float32": torch.full((32,), torch.finfo(torch.float32).max),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_adversarial_blocks(name: str) -> None:
    block = BLOCKS[name][None]
    assert_same(block)
    if bool((rounded := block.bfloat16()).isfinite().all()):
        assert_same(rounded)


@pytest.mark.parametrize(
    ("largest", "scale"),
    [
        (7.0, 127),
        (7.0000005, 128),
        (3.5, 126),
        (3.5000002, 127),
        (7 * 2.0**-127, 0),
        (8 * 2.0**-127, 1),
        (7 * 2.0**125, 252),
        (LARGEST, 252),
        (2.0**-149, 0),
        (0.0, 0),
    ],
)
def test_the_scale_is_the_smallest_with_largest_at_most_seven_times_it(largest: float, scale: int) -> None:
    for sign in (1, -1):
        assert terms.term_scales(with_values(_9=sign * largest)).tolist() == [scale]


def test_every_code_under_every_scale_comes_back_in_one_term() -> None:
    """All 16 codes: 6 among them says which scale it was. The other terms are zeros."""
    scales = torch.arange(253, dtype=torch.uint8)[:, None]
    codes = mxfp4.pack(torch.arange(16, dtype=torch.uint8).repeat(253, 2))
    for dtype in (torch.float32, torch.bfloat16):
        found, found_scales = terms.split(mxfp4.dequantize(codes, scales, dtype), 3)
        assert torch.equal(found[0], codes) and torch.equal(found_scales[0], scales)
        assert not found_scales[1:].any() and not (found[1:] & 0x77).any()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from([0, 2, 8, 30]))
def test_error_is_within_its_bound(seed: int, count: int, spread: float) -> None:
    x = random_blocks(seed, torch.float32, spread)
    x = x[x.isfinite().all(-1)]
    error = (terms.join(*terms.split(x, count)) - x.double()).abs().amax(-1)
    bound = (x.double().abs().amax(-1) / (3.5 * 8 ** (count - 1))).clamp(min=2.0**-128)
    assert bool((error <= bound).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nan_and_infinity_stay_in_their_block(bad: float, dtype: torch.dtype) -> None:
    x = random_blocks(3, dtype, 1).view(10, 128)
    whole_codes, whole_scales = terms.split(x, 3)
    x[4, 70] = bad
    codes, scales = terms.split(x, 3)
    assert scales[:, 4, 2].tolist() == [255] * 3
    assert not codes[:, 4, 32:48].any()
    block = torch.zeros(10, 4, dtype=torch.bool)
    block[4, 2] = True
    assert torch.equal(scales[:, ~block], whole_scales[:, ~block])
    assert torch.equal(codes.unflatten(-1, (4, 16))[:, ~block], whole_codes.unflatten(-1, (4, 16))[:, ~block])
    joined = terms.join(codes, scales)
    assert joined.isnan().sum() == 32 and joined[4, 64:96].isnan().all()


def distribution(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(4, 128, 2880, generator=generator, dtype=torch.float64)
    if name == "t(3)":
        return normal[0] / (normal[1:].square().sum(0) / 3).sqrt()
    if name == "product":
        return normal[0] * normal[1]
    if name == "outliers":
        normal[0, :, ::97] *= 30
    return normal[0]


@pytest.mark.parametrize(
    ("name", "bounds"),  # relative error of 1 to 4 terms in %, a twentieth above what is measured
    [
        ("gaussian", (11.8, 1.37, 0.107, 0.005)),
        ("t(3)", (15.0, 1.9, 0.20, 0.014)),
        ("outliers", (16.3, 2.3, 0.24, 0.022)),
        ("product", (13.6, 1.62, 0.155, 0.010)),
    ],
)
def test_relative_error(name: str, bounds: tuple[float, ...]) -> None:
    x = distribution(name).bfloat16()
    exact = x.double()
    codes, scales = terms.split(x, 4)
    for count, bound in enumerate(bounds, start=1):
        error = float((terms.join(codes[:count], scales[:count]) - exact).norm() / exact.norm())
        assert bound / 2 < 100 * error < bound, f"{count} terms: {100 * error:.4f} %"


def test_shapes_and_fewer_terms_are_the_first_of_more() -> None:
    x = torch.randn(2, 3, 96).bfloat16()
    codes, scales = terms.split(x, 4)
    assert codes.shape == (4, 2, 3, 48) and scales.shape == (4, 2, 3, 3)
    assert terms.join(codes, scales, torch.float32).dtype == torch.float32
    for count in (1, 2, 3):
        assert torch.equal(terms.split(x, count)[0], codes[:count])
    # A view that isn't contiguous, and one without rows.
    assert torch.equal(terms.split(x.transpose(0, 1)[::2], 4)[0], codes.transpose(1, 2)[:, ::2])
    assert terms.split(x[:0], 2)[0].shape == (2, 0, 3, 48)


@pytest.mark.parametrize(
    ("x", "count", "message"),
    [
        (torch.zeros(2, 40), 1, r"x is \[2, 40\], expected its last dimension a multiple of 32"),
        (torch.zeros(()), 1, r"x is \[\], expected"),
        (torch.zeros(2, 32), 0, "0 terms, expected 1 to 4"),
        (torch.zeros(2, 32), 5, "5 terms, expected 1 to 4"),
        (torch.zeros(2, 32, dtype=torch.float16), 1, "x is torch.float16, expected torch.bfloat16 or torch.float32"),
    ],
)
def test_what_cannot_be_split_is_refused(x: torch.Tensor, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        terms.split(x, count)
