# SPDX-License-Identifier: Apache-2.0
"""What the kernels compute, without a GPU: their source, run by an emulator that is strict about waits and barriers.

Dependent launches need a card.
"""

from __future__ import annotations

import ctypes
import random
import shutil
from collections.abc import Callable

import pytest
import torch

from tests.kernels.emulated import Emulated, MoeArgs, assert_a_lost_block_traps, configs, router
from tests.support.layers import random_weights
from vllm_mxfp4_sm120.backends.native.backend import ONE_KERNEL
from vllm_mxfp4_sm120.moe import Activation, MoEShape, reference, topk_softmax

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

CONFIGS = dict(enumerate(("decode", "gathered", *(f"tokens{tile}" for tile in (24, 40, 48, 64, 80, 112, 144)))))
SM_80, SM_90 = 800, 1200  # with all that SM 9.0 has, and the FP4 kernels (test_fp4_emulated.py)
# Each configuration, and on newer cards' road (bulk copies) those that have another there.
KERNELS_AND_CARDS = pytest.mark.parametrize(
    ("config", "library"),
    [*((config, SM_80) for config in CONFIGS), (0, SM_90), (1, SM_90)],
    indirect=["library"],
    ids=[*CONFIGS.values(), "decode with bulk copies", "gathered with bulk copies"],
)
# Against float64 with activations rounded to BF16: one rounding more, 1.65e-3; of few outputs it is no average.
TOLERANCE, TOLERANCE_OF_FEW = 2.0e-3, 2.8e-3


@pytest.fixture
def library(libraries: Callable[[int], ctypes.CDLL], request: pytest.FixtureRequest) -> ctypes.CDLL:
    return libraries(getattr(request, "param", SM_80))


def test_the_table(library: ctypes.CDLL):
    """Its names, by which rules choose, in the order of `config`."""
    assert list(configs(library)) == list(CONFIGS.values())
    assert list(configs(library).values()) == [8, 64, *[8192] * 7]


def inputs(shape: MoEShape, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, shape.hidden_size, generator=generator).bfloat16()
    return x, torch.randn(tokens, shape.num_experts, generator=generator)  # float32: no two logits are the same


def wrong_by(out: torch.Tensor, shape: MoEShape, x: torch.Tensor, logits: torch.Tensor, expert_map=None) -> float:
    ids, gates = topk_softmax(logits, shape.top_k)
    weights = random_weights(shape, "cpu")
    expected = reference(weights, x, ids, gates, shape.activation, expert_map, activation_dtype=torch.bfloat16)
    return float((out.double() - expected).norm() / expected.norm())


def tokens_for(config: int, tokens: int) -> int:
    """So many, or as many as the configuration takes."""
    return min(tokens, {0: 8, 1: 64}.get(config, tokens))


def problem(seed: int, config: int) -> tuple[MoEShape, int]:
    """A layer and a number of tokens: any multiples of 32, few or many tokens an expert, experts without any."""
    choose = random.Random(100 * config + seed)
    experts = choose.choice([1, 2, 5, 8, 16, 40])
    top_k = choose.randint(1, min(8, experts))
    hidden, intermediate = 32 * choose.randint(1, 12), 32 * choose.choice([1, 2, 3, 5, 8, 11])
    tokens = choose.choice([1, 9, 17, 64, 130, 200, 300]) if config > 1 else choose.randint(1, tokens_for(config, 64))
    while tokens * top_k * hidden * intermediate > 6e7:  # seconds, here
        tokens, hidden = -(-tokens // 2), max(32, hidden // 64 * 32)
    activation = choose.choice(list(Activation))
    shape = MoEShape(experts, experts, hidden, intermediate, top_k, choose.random() < 0.7, activation)
    return shape, tokens


@pytest.mark.parametrize("seed", range(9))
@KERNELS_AND_CARDS
def test_right(library: ctypes.CDLL, config: int, seed: int):
    shape, tokens = problem(seed, config)
    x, logits = inputs(shape, tokens, seed)
    library.emulate([1, 2, 3, 5, 9][seed % 5], seed % 3 > 0, seed)
    out = Emulated(library, shape, random_weights(shape, "cpu"))(x, logits, config)
    assert wrong_by(out, shape, x, logits) <= (TOLERANCE if out.numel() >= 1000 else TOLERANCE_OF_FEW), (shape, tokens)


@KERNELS_AND_CARDS
def test_the_same_bits_in_any_order(library: ctypes.CDLL, config: int):
    """However warps are scheduled and whenever copies land; with as many blocks, for those share the work."""
    shape = MoEShape(5, 5, 96, 64, 3)
    x, logits = inputs(shape, tokens_for(config, 13), 0)
    layer = Emulated(library, shape, random_weights(shape, "cpu"))
    outs = []
    for seed in range(4):
        library.emulate(3, seed % 2 == 0, seed)
        outs.append(layer(x, logits, config))
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_a_few_tokens_get_the_same_bits_beside_many(library: ctypes.CDLL):
    """Gathered or not, K is cut the same way: what a token gets doesn't depend on how many others there are."""
    shape = MoEShape(5, 5, 352, 64, 3)
    x, logits = inputs(shape, 60, 0)
    layer = Emulated(library, shape, random_weights(shape, "cpu"))
    library.emulate(3, True, 0)
    together = layer(x, logits, config=1)
    for begin in range(0, 60, 6):
        some = slice(begin, begin + 6)
        assert torch.equal(layer(x[some], logits[some], config=0), together[some]), begin


def test_a_token_gets_the_same_bits_whatever_others_there_are(library: ctypes.CDLL):
    """Of the kernel that Native.fix_kernel takes."""
    config, shape = list(CONFIGS.values()).index(ONE_KERNEL), MoEShape(3, 3, 352, 64, 2)
    x, logits = inputs(shape, 70, 0)
    layer = Emulated(library, shape, random_weights(shape, "cpu"))
    library.emulate(3, True, 0)
    together = layer(x, logits, config)
    for some in (slice(0, 1), slice(1, 10), slice(10, 70)):
        assert torch.equal(layer(x[some], logits[some], config), together[some]), some


def test_call_after_call(library: ctypes.CDLL):
    """Some of the workspace carries over: decode takes two exchanges in turn, the grouped kernels leave zeros."""
    shape = MoEShape(5, 5, 96, 64, 3)
    given = {config: inputs(shape, tokens_for(config, 13), config) for config in CONFIGS}
    layer = Emulated(library, shape, random_weights(shape, "cpu"))
    library.emulate(3, True, 0)
    alone = {config: layer(*given[config], config) for config in CONFIGS}
    workspace = layer.workspace(64)
    for config in (0, 0, 1, 0, *CONFIGS, 0, 2, 1, 1, 0, 7, 1, 0):
        assert torch.equal(layer(*given[config], config, workspace=workspace), alone[config]), CONFIGS[config]


@pytest.mark.parametrize("library", [SM_80, SM_90], indirect=True, ids=["sm_80", "sm_90"])
def test_calls_of_other_sizes(library: ctypes.CDLL):
    """What decode's blocks exchange is gone when the next but one begins, whatever was larger: tokens or the layer."""
    shapes = MoEShape(5, 5, 96, 64, 3), MoEShape(8, 8, 64, 192, 2), MoEShape(2, 2, 256, 32, 1)
    layers = [Emulated(library, shape, random_weights(shape, "cpu")) for shape in shapes]
    workspace = max((layer.workspace(64) for layer in layers), key=torch.Tensor.numel)
    library.emulate(3, True, 0)
    for seed, (tokens, layer) in enumerate(zip((16, 1, 2, 64, 8, 3, 33, 5, 1, 1, 9), layers * 4, strict=False)):
        x, logits = inputs(layer.shape, tokens, seed)
        config = 0 if tokens <= 8 else 1
        assert torch.equal(layer(x, logits, config, workspace=workspace), layer(x, logits, config)), seed


@pytest.mark.parametrize("blocks", [1, 2, 5, 17, 40])
@pytest.mark.parametrize("library", [SM_80, SM_90], indirect=True, ids=["sm_80", "sm_90"])
def test_one_token(library: ctypes.CDLL, blocks: int):
    """More or fewer blocks than there is work for; call after call; all of its experts here, some, none."""
    shape = MoEShape(8, 8, 160, 96, 3)
    layer = Emulated(library, shape, random_weights(shape, "cpu"))
    workspace = layer.workspace(1)
    everywhere = torch.arange(8, dtype=torch.int32)
    for seed, here in enumerate((everywhere >= 0, everywhere % 2 == 0, everywhere < 0, everywhere >= 0)):
        x, logits = inputs(shape, 1, seed)
        expert_map = torch.where(here, everywhere, -1)
        library.emulate(blocks, seed % 2 == 0, seed)
        out = layer(x, logits, 0, expert_map, workspace)
        if here.any():
            assert wrong_by(out, shape, x, logits, expert_map) <= TOLERANCE_OF_FEW, seed
        else:
            assert not out.any(), seed


# As int32 bits, whose upper half is a BF16's: quiet, signalling, negative, ones only.
NANS = (0x7FFFFFFF, 0x7F810000, 0xFFC00000 - (1 << 32), -1)


@KERNELS_AND_CARDS
@pytest.mark.parametrize("where", ["x", "logits", "topk_weights"])
def test_a_nan_stays_with_its_token(library: ctypes.CDLL, config: int, where: str):
    """Whatever its bits: what decode's blocks hand each other may be any value but a NaN of ones only."""
    shape = MoEShape(4, 4, 64, 96, 2)
    x, logits = inputs(shape, tokens_for(config, 15), 1)
    ids, weights = topk_softmax(logits, shape.top_k)
    library.emulate(2, True, 0)
    layer = Emulated(library, shape, random_weights(shape, "cpu"))

    def run() -> torch.Tensor:
        return (
            layer(x, logits, config) if where != "topk_weights" else layer(x, None, config, topk=(ids.int(), weights))
        )

    clean, others = run(), torch.arange(len(x)) != 5
    bits = {"x": x.view(torch.int16), "logits": logits.view(torch.int32), "topk_weights": weights.view(torch.int32)}
    for nan in NANS:
        bits[where][5, 0] = nan >> 16 if where == "x" else nan
        poisoned = run()
        assert poisoned[5].isnan().all() and torch.equal(poisoned[others], clean[others]), hex(nan)


@KERNELS_AND_CARDS
@pytest.mark.parametrize("infinity", [torch.inf, -torch.inf])
def test_infinity_stays_with_its_token(library: ctypes.CDLL, config: int, infinity: float):
    shape = MoEShape(4, 4, 64, 96, 2)
    x, logits = inputs(shape, tokens_for(config, 15), 1)
    library.emulate(2, True, 0)
    layer = Emulated(library, shape, random_weights(shape, "cpu"))
    clean = layer(x, logits, config)
    x[5, 0], logits[6, 2] = infinity, infinity
    poisoned = layer(x, logits, config)
    others = (torch.arange(len(x)) != 5) & (torch.arange(len(x)) != 6)
    assert torch.equal(poisoned[others], clean[others])
    right = reference(random_weights(shape, "cpu"), x, *topk_softmax(logits, shape.top_k))
    assert torch.equal(poisoned.isfinite(), right.isfinite())


@KERNELS_AND_CARDS
def test_ids_of_any_value(library: ctypes.CDLL, config: int):
    """What isn't an expert's number, in the ids or in the expert map, is not here; experts may be chosen twice."""
    shape = MoEShape(6, 4, 64, 96, 4)
    x, logits = inputs(shape, tokens_for(config, 20), 1)
    ids, gates = (tensor.contiguous() for tensor in topk_softmax(logits, shape.top_k))
    odd = torch.tensor([-1, -2, -32768, -65535, -65536, -(1 << 31), 6, 7, 256, 65536, 65538, (1 << 31) - 1])
    places = torch.arange(ids.numel()) % 3 == 1
    ids.view(-1)[places] = odd.repeat(ids.numel())[: int(places.sum())]
    ids[3, 2:] = ids[3, 0]
    expert_map = torch.tensor([2, -65536, 0, 4, 3, 1], dtype=torch.int32)
    library.emulate(2, True, 0)
    weights = random_weights(shape, "cpu")
    out = Emulated(library, shape, weights)(x, None, config, expert_map, topk=(ids.int(), gates))
    known = torch.where((ids >= 0) & (ids < 6), ids, 1)  # which isn't here
    here = torch.where((expert_map >= 0) & (expert_map < 4), expert_map, -1)
    expected = reference(weights, x, known, gates, shape.activation, here, activation_dtype=torch.bfloat16)
    assert float((out.double() - expected).norm() / expected.norm()) <= TOLERANCE_OF_FEW


@KERNELS_AND_CARDS
@pytest.mark.parametrize("chosen", [True, False], ids=["some are here", "none is here"])
def test_another_ranks_experts_are_left_out(library: ctypes.CDLL, config: int, chosen: bool):
    shape = MoEShape(8, 4, 64, 64, 2)
    x, logits = inputs(shape, tokens_for(config, 12), 2)
    expert_map = torch.full((8,), -1, dtype=torch.int32)
    expert_map[1::2] = torch.tensor([2, 0, 3, 1], dtype=torch.int32)
    if not chosen:
        logits[:, 1::2] -= 100
    library.emulate(3, True, 0)
    out = Emulated(library, shape, random_weights(shape, "cpu"))(x, logits, config, expert_map)
    if chosen:
        assert wrong_by(out, shape, x, logits, expert_map) <= TOLERANCE_OF_FEW
    else:
        assert not out.any()


@KERNELS_AND_CARDS
@pytest.mark.parametrize("far", [20, -20])
def test_each_column_by_itself(library: ctypes.CDLL, config: int, far: int):
    """Neighbouring columns are 2^20 times as large or as small, whichever of the four that the kernels pack together;

    a token is large and one is tiny. Each column and each token is right by itself.
    """
    shape = MoEShape(4, 4, 64, 96, 2, has_bias=False)
    x, logits = inputs(shape, tokens_for(config, 100), 4)
    x[2], x[3] = x[2] * 2**10, x[3] * 2**-10
    weights = random_weights(shape, "cpu")
    weights.w2_scale[:, torch.arange(64) * 5 // 4 % 5 == 0] += far
    library.emulate(2, True, 0)
    out = Emulated(library, shape, weights)(x, logits, config)
    ids, gates = topk_softmax(logits, shape.top_k)
    expected = reference(weights, x, ids, gates, shape.activation, None, activation_dtype=torch.bfloat16)
    ordinary = (torch.arange(len(x)) < 2) | (torch.arange(len(x)) > 3)
    sizes = expected[ordinary].norm(dim=0)
    assert sizes.max() > 2**19 * sizes.min()
    error, expected = (out.double() - expected) / sizes, expected / sizes  # each column of size 1
    of_all = error[ordinary].norm() / expected[ordinary].norm()
    assert of_all <= (TOLERANCE if len(x) > 8 else TOLERANCE_OF_FEW)
    assert error[ordinary].norm(dim=0).max() <= TOLERANCE * (1 + 3 / len(x) ** 0.5)
    assert (error.norm(dim=1) / expected.norm(dim=1)).max() <= 2 * TOLERANCE


@pytest.mark.parametrize(
    ("config", "shape", "tokens", "message"),
    [
        (0, MoEShape(8, 8, 32, 32, 8), 9, b"decode takes up to 8 tokens, not 9"),
        (1, MoEShape(8, 8, 32, 32, 8), 65, b"gathered takes up to 64 tokens, not 65"),
        (1, MoEShape(8, 8, 2912, 32, 1), 9, b"gathered takes up to 2880 as the larger of hidden and intermediate size"),
        (1, MoEShape(8, 8, 2880, 32, 8), 33, b"gathered takes up to 737280 values"),
        (2, MoEShape(8, 8, 32, 32, 8), 8193, b"tokens24 takes up to 8192 tokens, not 8193"),
    ],
)
def test_what_a_configuration_cannot_take(
    library: ctypes.CDLL, config: int, shape: MoEShape, tokens: int, message: bytes
):
    """Refused, naming the limit; never another kernel's answer."""
    library.moe.restype = ctypes.c_char_p
    args = MoeArgs(M=tokens, H=shape.hidden_size, I=shape.intermediate_size, top_k=shape.top_k)
    assert library.moe(ctypes.byref(args), config).startswith(message)


@pytest.mark.parametrize(("tokens", "experts", "hidden"), [(1, 32, 2880), (7, 5, 736), (64, 3, 8), (6, 2, 9216)])
def test_router(library: ctypes.CDLL, tokens: int, experts: int, hidden: int):
    x, _ = inputs(MoEShape(experts, experts, hidden, 32, 1), tokens, 3)
    weight, bias = torch.randn(experts, hidden).bfloat16(), torch.randn(experts).bfloat16()
    expected = x.double() @ weight.double().T
    for given in (None, bias):
        right = expected if given is None else expected + bias.double()
        torch.testing.assert_close(router(library, x, weight, given).double(), right, rtol=2**-8, atol=1e-3)


@pytest.mark.usefixtures("one_thread")  # a child has none of its parent's threads
@KERNELS_AND_CARDS
def test_a_block_that_never_arrives_ends_the_kernel(library: ctypes.CDLL, config: int, capfd: pytest.CaptureFixture):
    """With an error, by those who wait for what it was to make; in a child, for the emulator aborts at a trap."""
    shape = MoEShape(4, 4, 320, 96, 2)  # of down more than one row block: who makes it waits for both blocks
    x, logits = inputs(shape, tokens_for(config, 12), 1)
    layer = Emulated(library, shape, random_weights(shape, "cpu"))
    assert_a_lost_block_traps(library, lambda: layer(x, logits, config), capfd)
