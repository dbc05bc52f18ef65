# SPDX-License-Identifier: Apache-2.0
"""What the dense kernels compute, without a GPU: their source, run by the emulator."""

from __future__ import annotations

import ctypes
import random
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.emulated import dense, dense_configs, dequantized
from vllm_mxfp4_sm120.dense.int8 import Int8Weights

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

STREAMING = ("bf16_rows24_tokens16", "bf16_rows40_tokens16", "bf16_rows24_tokens32", "bf16_rows40_tokens32")
STREAMING += ("int8_rows40_tokens8", "int8_rows24_tokens16", "int8_rows40_tokens16", "int8_rows64_tokens16")
STREAMING += ("int8_rows24_tokens32", "int8_rows40_tokens32")
TILED = ("int8_128x64",)
CONFIGS = dict(enumerate(STREAMING + TILED))
EACH = pytest.mark.parametrize("config", CONFIGS, ids=list(CONFIGS.values()))
# Against float64 on the weights as given: of BF16 the output's rounding; INT8's own error is some 0.5 %.
TOLERANCE, TOLERANCE_OF_INT8 = 2.0e-3, 6.0e-3


@pytest.fixture
def library(libraries: Callable[[int], ctypes.CDLL]) -> ctypes.CDLL:
    return libraries(800)


def is_int8(config: int) -> bool:
    return CONFIGS[config].startswith("int8")


def problem(tokens: int, rows: int, k: int, seed: int, config: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x, the weights in float64 as they were before quantization, and as the kernel takes them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator).bfloat16()
    weight = (torch.randn(rows, k, generator=generator) * torch.rand(rows, 1, generator=generator)).bfloat16()
    if not is_int8(config):
        return x, weight.double(), weight, None
    encoded = Int8Weights.quantize(weight)
    return x, weight.double(), encoded.codes, encoded.scales


def wrong_by(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def test_the_table(library: ctypes.CDLL):
    assert dense_configs(library) == list(CONFIGS.values())
    library.dense_chosen.restype = ctypes.c_char_p
    for int8, tokens, first_fit in (
        (False, 1, "bf16_rows24_tokens16"),
        (False, 16, "bf16_rows24_tokens16"),
        (False, 17, "bf16_rows24_tokens32"),
        (False, 256, "bf16_rows40_tokens32"),
        (True, 8, "int8_rows40_tokens8"),
        (True, 9, "int8_rows24_tokens16"),
        (True, 32, "int8_rows24_tokens32"),
        (True, 33, "int8_128x64"),
        (True, 256, "int8_128x64"),
    ):
        assert library.dense_chosen(int8, tokens).decode() == first_fit


@EACH
@pytest.mark.parametrize("seed", range(5))
def test_right(library: ctypes.CDLL, config: int, seed: int):
    """Any numbers of tokens and rows, any K; more blocks than rows, several passes a block, parts of K, and both."""
    choose = random.Random(100 * config + seed)
    tokens = choose.choice((1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 70, 256 if seed == 3 else 40))
    rows = choose.choice((1, 5, 8, 39, 41, 80, 133, 250, 257))
    k = 64 * choose.choice((1, 2, 3, 7, 8, 9, 11, 12, 17, 37))
    assert_right(library, config, [1, 2, 3, 9][seed % 4], tokens, rows, k, seed)


@pytest.mark.parametrize(
    ("blocks", "tokens", "rows", "k"),
    [
        (1, 65, 257, 192),
        (4, 66, 257, 64 * 43),
        (24, 129, 17, 576),
        (8, 256, 129, 576),
        (64, 193, 17, 128),
        (7, 33, 1, 448),
        (3, 33, 1, 64),
    ],
    ids=str,
)
def test_right_in_tiles(library: ctypes.CDLL, blocks: int, tokens: int, rows: int, k: int):
    """Several groups of tokens, beside parts of K, or several passes, or both; fewer steps than stages."""
    assert_right(library, len(STREAMING), blocks, tokens, rows, k, rows)


def assert_right(library: ctypes.CDLL, config: int, blocks: int, tokens: int, rows: int, k: int, seed: int) -> None:
    x, _, weight, scale = problem(tokens, rows, k, seed, config)
    bias = torch.randn(rows).bfloat16() if seed % 2 else None
    library.emulate(blocks, True, seed)
    out = dense(library, config, x, weight, scale, bias).double()
    # What the kernel multiplies with, exactly: only the tiled ones round a weight after its scale.
    dtype = torch.bfloat16 if CONFIGS[config] in TILED else torch.float64
    exact = (weight if scale is None else Int8Weights(weight, scale).decode(dtype=dtype)).double()
    offset = torch.zeros(rows, dtype=torch.float64) if bias is None else bias.double()
    expected = x.double() @ exact.T + offset
    # Each output: half a step of BF16, and FP32 sums.
    bound = expected.abs() * 2**-8 + (x.double().abs() @ exact.abs().T + offset.abs()) * 2**-20
    assert ((out - expected).abs() <= bound).all()


@EACH
def test_error_of_a_layer(library: ctypes.CDLL, config: int):
    """Against float64 on the weights before they were quantized."""
    x, exact, weight, scale = problem(16, 200, 1600, 3, config)
    library.emulate(5, True, 0)
    out = dense(library, config, x, weight, scale, None)
    assert wrong_by(out, x.double() @ exact.T) <= (TOLERANCE_OF_INT8 if is_int8(config) else TOLERANCE)
    if (
        scale is not None and CONFIGS[config] in STREAMING
    ):  # the weights' rounding to INT8 is all there is but the output's
        decoded = Int8Weights(weight, scale).decode(dtype=torch.float64)
        assert wrong_by(out, x.double() @ decoded.T) <= TOLERANCE


@EACH
def test_the_same_bits_in_any_order(library: ctypes.CDLL, config: int):
    """However warps are scheduled, whether copies land late or at once, and beside any other tokens.

    With any number of blocks, too, where that says nothing of how K is split.
    """
    x, _, weight, scale = problem(20, 100, 64 * 15, 0, config)
    outs = []
    for seed, blocks in enumerate((7, 7, 7) if CONFIGS[config] in TILED else (7, 7, 1, 3)):
        library.emulate(blocks, seed != 1, seed)
        outs.append(dense(library, config, x, weight, scale, None))
    outs.append(torch.cat([dense(library, config, x[i : i + 3], weight, scale, None) for i in range(0, 20, 3)]))
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize(("rows", "k"), [(1, 32), (7, 96), (130, 2880)])
def test_dequantized(library: ctypes.CDLL, rows: int, k: int):
    """The same bits as torch's."""
    weights = Int8Weights.quantize(torch.randn(rows, k) * torch.rand(rows, 1))
    library.emulate(3, True, 0)
    out = dequantized(library, weights.codes, weights.scales)
    assert torch.equal(out, weights.decode(dtype=torch.bfloat16))


@EACH
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_with_its_token(library: ctypes.CDLL, config: int, value: float):
    x, _, weight, scale = problem(18, 20, 192, 1, config)
    library.emulate(2, True, 0)
    clean = dense(library, config, x, weight, scale, None)
    x[5, 40] = value
    poisoned = dense(library, config, x, weight, scale, None)
    others = torch.arange(18) != 5
    assert torch.equal(poisoned[others], clean[others]) and not poisoned[5].isfinite().any()


@EACH
def test_nothing_beside_the_weights_is_read(library: ctypes.CDLL, config: int):
    """A token's or a row's neighbours in memory are NaN: they are never part of a sum."""
    x, _, weight, scale = problem(3, 13, 192, 2, config)
    x = torch.cat((x, torch.full_like(x, torch.nan)))[:3]
    library.emulate(2, True, 0)
    expected = dense(library, config, x, weight, scale, None)
    wide = torch.full((2 * len(weight), 192), 127, dtype=weight.dtype)
    wide[: len(weight)] = weight
    assert torch.equal(dense(library, config, x, wide[: len(weight)], scale, None), expected)
    assert expected.isfinite().all()


@pytest.mark.parametrize("config", [number for number in CONFIGS if is_int8(number)])
def test_every_int8_is_itself(library: ctypes.CDLL, config: int):
    """Each code from -127 to 127 times a few scales, one at a time: the output is the product, rounded once."""
    codes = torch.arange(-127, 128, dtype=torch.int8)
    weight = torch.zeros(255, 64, dtype=torch.int8)
    library.emulate(4, True, 0)
    for place, scale_value in ((0, 1.0), (21, 0.0123), (63, 2.0**-40)):
        weight.zero_()
        weight[:, place] = codes
        scale = torch.full((1, 255, 2), scale_value).bfloat16()
        x = torch.zeros(1, 64).bfloat16()
        x[0, place] = 1
        expected = (codes.double() * scale[0, :, 0].double()).bfloat16()
        assert torch.equal(dense(library, config, x, weight, scale, None)[0], expected)
