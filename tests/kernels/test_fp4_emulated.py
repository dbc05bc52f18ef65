# SPDX-License-Identifier: Apache-2.0
"""What the FP4 kernels compute, without a GPU: the product's operands, activations as terms, the whole layer."""

from __future__ import annotations

import ctypes
import math
import os
import random
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.emulated import Emulated, assert_a_lost_block_traps
from tests.kernels.emulated_fp4 import SELECTORS, EmulatedFp4, fp4_configs, product
from tests.kernels.test_emulated import inputs
from tests.support.layers import BAD, OVERFLOWS, adversarial, random_weights
from vllm_mxfp4_sm120 import terms as fp4_terms
from vllm_mxfp4_sm120.checkpoint import published_config
from vllm_mxfp4_sm120.fit import Memory
from vllm_mxfp4_sm120.moe import Activation, MoEShape, MoEWeights, activate, reference, topk_softmax
from vllm_mxfp4_sm120.mxfp4 import E2M1_VALUES, dequantize
from vllm_mxfp4_sm120.proof.problem import scattered

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

CONFIGS = dict(enumerate(f"terms{terms}_tokens{tokens}" for terms in (1, 2, 3, 4) for tokens in (64, 128)))
EACH = pytest.mark.parametrize("config", CONFIGS, ids=list(CONFIGS.values()))
TWIN = pytest.mark.parametrize("twin", [False, True], ids=["instruction", "twin"])
# Of a layer's output against float64, by terms: over many outputs, and over a few hundred, which are no average.
TOLERANCE, TOLERANCE_OF_FEW = {1: 0.25, 2: 3.2e-2, 3: 3.6e-3, 4: 1.9e-3}, {1: 0.27, 2: 4.7e-2, 3: 4.2e-3, 4: 2.1e-3}
BF16_CONFIG = 5  # tokens64 of the other kernels


@pytest.fixture
def library(libraries: Callable[[int], ctypes.CDLL]) -> ctypes.CDLL:
    return libraries(1200)


def test_the_table(library: ctypes.CDLL):
    assert fp4_configs(library) == {name: int(name[5]) for name in CONFIGS.values()}


@pytest.mark.parametrize(("experts", "intermediate", "ranks"), [(32, 2880, 1), (128, 2880, 2), (16, 736, 1)])
@pytest.mark.parametrize("tokens", [1, 300, 2048, 8192, 16384])
def test_the_workspace_is_what_inspect_counts(
    library: ctypes.CDLL, tokens: int, experts: int, intermediate: int, ranks: int
):
    """For calls of up to so many tokens: of the next power of two of them, at most of a launch's."""
    config = published_config("openai/gpt-oss-20b")
    memory = Memory(config | {"num_local_experts": experts, "intermediate_size": intermediate})
    shape = MoEShape(experts, experts, 2880, memory.shard(ranks), 4)
    launch = min(2 ** math.ceil(math.log2(tokens)), 8192)
    bf16, fp4 = (kind(library, shape, random_weights(MoEShape(1, 1, 32, 32, 1))) for kind in (Emulated, EmulatedFp4))
    assert memory.workspace(tokens, ranks) == bf16.workspace_bytes(launch)
    assert memory.workspace(tokens, ranks, fp4=True) == fp4.workspace_bytes(launch) > bf16.workspace_bytes(launch)


def words(codes: Tensor) -> Tensor:
    """Codes [..., 8 n] -> int32 [..., n], the first in the lowest bits."""
    shifts = 4 * torch.arange(8)
    return (codes.unflatten(-1, (-1, 8)).long() << shifts).sum(-1).to(torch.int32)


def operands(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [16, 64] and [8, 64] (column by column) as lanes hold them, by the PTX ISA's figures for m16n8k64."""
    a, b = words(a).view(16, 2, 4), words(b).view(8, 2, 4)  # row, half, q
    lanes_a = torch.stack((a[:8, 0], a[8:, 0], a[:8, 1], a[8:, 1]), -1)  # g, q, register
    return lanes_a.reshape(32, 4), b.permute(0, 2, 1).reshape(32, 2)


def values(codes: Tensor) -> Tensor:
    return torch.tensor(E2M1_VALUES, dtype=torch.float64)[codes.long()]


def accumulators(matrix: Tensor) -> Tensor:
    """[16, 8] -> [32, 4] as lanes hold it."""
    return matrix.view(2, 8, 4, 2).permute(1, 2, 0, 3).reshape(32, 4)


@TWIN
def test_every_operand_position_with_every_code(library: ctypes.CDLL, twin: bool):
    """One operand has every code at every position in turn, the other picks a position for each output."""
    ones = torch.full((32, 4), 127, dtype=torch.uint8)

    def picks(rows: int, first: int) -> Tensor:
        one = torch.zeros(rows, 64, dtype=torch.uint8)
        one[torch.arange(rows), first + torch.arange(rows)] = 2
        return one

    def multiplied(a: Tensor, b: Tensor) -> Tensor:
        return product(library, 0, twin, *operands(a, b), ones, ones, torch.zeros(32, 4)).double()

    for shift in range(16):
        a, b = ((torch.arange(rows)[:, None] + 5 * torch.arange(64) + shift).byte() % 16 for rows in (16, 8))
        for first in range(0, 64, 8):
            assert torch.equal(multiplied(a, picks(8, first)), accumulators(values(a[:, first : first + 8]))), first
        for first in range(0, 64, 16):
            expected = values(b[:, first : first + 16]).T.contiguous()
            assert torch.equal(multiplied(picks(16, first), b), accumulators(expected)), first


@TWIN
@pytest.mark.parametrize("selector", range(32))
def test_scales_are_selected(library: ctypes.CDLL, twin: bool, selector: int):
    """All bytes of all lanes differ by powers of two from their neighbours; small sums are exact in any order."""
    a_byte, a_thread, b_byte, b_thread = SELECTORS[selector]
    generator = torch.Generator().manual_seed(selector)
    a, b = (torch.randint(0, 16, (rows, 64), generator=generator, dtype=torch.uint8) for rows in (16, 8))
    scales = [torch.randint(124, 131, (32, 4), generator=generator, dtype=torch.uint8) for _ in range(2)]
    d = torch.randint(-100, 100, (16, 8), generator=generator).float()
    out = product(library, selector, twin, *operands(a, b), *scales, accumulators(d))
    by_lane_a, by_lane_b = (2.0 ** (tensor.double() - 127) for tensor in scales)
    quads = torch.arange(8) * 4
    rows = torch.cat((by_lane_a[quads + 2 * a_thread], by_lane_a[quads + 2 * a_thread + 1]))[:, a_byte : a_byte + 2]
    columns = by_lane_b[quads + b_thread][:, b_byte : b_byte + 2]
    scaled_a = values(a) * rows.repeat_interleave(32, 1)
    scaled_b = values(b) * columns.repeat_interleave(32, 1)
    assert torch.equal(out.double(), accumulators(d.double() + scaled_a @ scaled_b.T))


@TWIN
def test_a_scale_of_255_is_nan(library: ctypes.CDLL, twin: bool):
    zeros, scales = torch.zeros(16, 64, dtype=torch.uint8), torch.full((32, 4), 127, dtype=torch.uint8)
    scales_a = scales.clone()
    scales_a[4 * 3, 1] = 255  # of row 3's upper half of K
    out = product(library, 0, twin, *operands(zeros, zeros[:8]), scales_a, scales, torch.zeros(32, 4))
    expected = torch.zeros(16, 8)
    expected[3] = torch.nan
    assert torch.equal(out.isnan(), accumulators(expected).isnan()) and not out.nan_to_num().any()


@EACH
def test_tokens_become_the_reference_s_terms(library: ctypes.CDLL, config: int):
    """Bit by bit, of a K that ends in half a step too; what the kernel makes of activations as well."""
    shape, tokens, terms = MoEShape(2, 2, 96, 96, 1), 12, fp4_configs(library)[CONFIGS[config]]
    x = adversarial(tokens, shape.hidden_size)
    layer = EmulatedFp4(library, shape, random_weights(shape, "cpu"))
    workspace = layer.workspace(tokens)
    library.emulate(3, True, 0)
    layer(x, torch.zeros(tokens, 2), config, workspace=workspace)
    codes, scales = fp4_terms.split(x, terms)
    found = layer.terms(workspace, tokens, terms, activations=False)
    assert torch.equal(found[1], scales) and torch.equal(found[0], codes)
    codes, scales = layer.terms(workspace, tokens, terms, activations=True)
    assert not ((codes.view(terms, tokens, -1, 16) != 0).any(-1) & (scales == 255)).any()
    damaged = (scales == 255).any(0).any(-1)
    damaged[OVERFLOWS] = False
    assert damaged.nonzero().flatten().tolist() == BAD


# Every kernel has its turn: with 1664, more than two hundred times (a quarter of an hour).
PROBLEMS = int(os.environ.get("FP4_PROBLEMS", "8"))
MOST_PRODUCTS = 4e6  # of a problem, as many as take a second here


def problem(seed: int, most: float = MOST_PRODUCTS) -> tuple[MoEShape, int, Tensor | None]:
    """A layer, tokens, an expert map: any multiples of 32, experts with none, few or most tokens."""
    choose = random.Random(seed)
    experts = choose.choice([1, 2, 5, 8, 16])
    local = choose.randint(1, experts) if choose.random() < 0.3 else experts
    top_k = choose.randint(1, min(4, experts))
    hidden, intermediate = 32 * choose.randint(1, 12), 32 * choose.choice([1, 2, 3, 5, 8, 11])
    tokens = choose.choice([1, 9, 17, 40, 64, 100, 130, 200, 300])
    while tokens * top_k * hidden * intermediate > most:
        tokens, hidden = -(-tokens // 2), max(32, hidden // 64 * 32)
    shape = MoEShape(
        experts, local, hidden, intermediate, top_k, choose.random() < 0.7, choose.choice(list(Activation))
    )
    expert_map = torch.full((experts,), -1, dtype=torch.int32)
    expert_map[torch.tensor(choose.sample(range(experts), local))] = torch.arange(local, dtype=torch.int32)
    return shape, tokens, None if local == experts else expert_map


def of_terms(values: Tensor, terms: int) -> Tensor:
    return fp4_terms.join(*fp4_terms.split(values, terms))


def reference_on_terms(
    weights: MoEWeights, x: Tensor, logits: Tensor, shape: MoEShape, expert_map, terms: int
) -> Tensor:
    """The layer in float64 on the same terms as the kernels: what is left is FP32 sums and the output's rounding."""
    ids, gates = topk_softmax(logits, shape.top_k)
    x, out = of_terms(x, terms), torch.zeros(x.shape, dtype=torch.float64)
    for expert in ids.unique().tolist():
        local = expert if expert_map is None else int(expert_map[expert])
        if local < 0:
            continue
        token, slot = (ids == expert).nonzero(as_tuple=True)
        hidden = x[token] @ dequantize(weights.w13[local], weights.w13_scale[local], torch.float64).T
        if weights.w13_bias is not None:
            hidden += weights.w13_bias[local].double()
        act = of_terms(activate(hidden, shape.activation).float(), terms)
        down = act @ dequantize(weights.w2[local], weights.w2_scale[local], torch.float64).T
        if weights.w2_bias is not None:
            down += weights.w2_bias[local].double()
        out.index_add_(0, token, down * gates[token, slot].double()[:, None])
    return out


def errors(library: ctypes.CDLL, seed: int, config: int) -> dict[str, float] | None:
    """Of the output against float64, on the same terms and exact, and of the BF16 kernels; None if it is all zeros."""
    shape, tokens, expert_map = problem(seed)
    x, logits = inputs(shape, tokens, seed)
    if seed % 3 == 0:
        logits[:, 0] += 3  # most tokens choose the same expert
    library.emulate([1, 2, 3, 5, 9][seed % 5], seed % 4 > 0, seed)
    weights, terms = random_weights(shape, "cpu"), config // 2 + 1
    right = reference(weights, x, *topk_softmax(logits, shape.top_k), shape.activation, expert_map)
    if not right.any():
        return None
    on_terms = reference_on_terms(weights, x, logits, shape, expert_map, terms)
    out = EmulatedFp4(library, shape, weights)(x, logits, config, expert_map)
    bf16 = Emulated(library, shape, weights)(x, logits, BF16_CONFIG, expert_map)

    def wrong_by(out: Tensor, right: Tensor) -> float:
        return float((out.double() - right).norm() / right.norm())

    return {"on terms": wrong_by(out, on_terms), "exact": wrong_by(out, right), "bf16": wrong_by(bf16, right)}


@pytest.mark.parametrize("seed", range(PROBLEMS))
def test_right(library: ctypes.CDLL, seed: int):
    config = seed % len(CONFIGS)
    if (found := errors(library, seed, config)) is None:
        pytest.skip("no token chooses an expert that is here")
    (shape, tokens, _), terms = problem(seed), config // 2 + 1
    tolerance = TOLERANCE if tokens * shape.hidden_size >= 1000 else TOLERANCE_OF_FEW
    # An activation that lies at the border of two codes may get the other one: of one term that is 0.1 of it.
    assert found["on terms"] <= (2e-2, 4e-3, 2.8e-3, 2.1e-3)[config // 2], (problem(seed), CONFIGS[config], found)
    assert found["exact"] <= tolerance[terms], (problem(seed), CONFIGS[config], found)
    if terms == 4:  # what they are for: BF16's accuracy
        assert found["exact"] <= found["bf16"], (problem(seed), CONFIGS[config], found)


@pytest.mark.parametrize(
    ("shape", "tokens", "config"),
    [
        (MoEShape(256, 256, 64, 32, 8), 3, 6),
        (MoEShape(256, 3, 32, 96, 8), 150, 7),
        (MoEShape(1, 1, 7168, 32, 1), 1, 7),
        (MoEShape(2, 2, 32, 7168, 2), 1, 6),
    ],
    ids=["most experts", "few of them here", "largest hidden size", "largest intermediate size"],
)
def test_right_at_the_limits(library: ctypes.CDLL, shape: MoEShape, tokens: int, config: int):
    x, logits = inputs(shape, tokens, 0)
    expert_map = scattered(shape, "cpu")
    library.emulate(3, True, 0)
    out = EmulatedFp4(library, shape, random_weights(shape))(x, logits, config, expert_map)
    right = reference(random_weights(shape), x, *topk_softmax(logits, shape.top_k), shape.activation, expert_map)
    assert float((out.double() - right).norm() / right.norm()) <= TOLERANCE_OF_FEW[config // 2 + 1]


@EACH
def test_the_same_bits_in_any_order_and_call_after_call(library: ctypes.CDLL, config: int):
    shape = MoEShape(5, 5, 96, 96, 3)
    x, logits = inputs(shape, 30, 0)
    layer = EmulatedFp4(library, shape, random_weights(shape, "cpu"))
    workspace, outs = layer.workspace(30), []
    for seed in range(3):
        library.emulate(seed + 1, seed % 2 == 0, seed)
        outs.append(layer(x, logits, config, workspace=workspace))
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("config", [1, 3, 5, 7], ids=CONFIGS.get)
def test_bad_rows_stay_alone(library: ctypes.CDLL, config: int):
    """NaN and infinity make their token NaN and no other; sums beyond FP32 do what they do in the BF16 kernels."""
    shape = MoEShape(4, 4, 96, 96, 2)
    x, logits = adversarial(40, 96), torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    library.emulate(2, True, 0)
    layer = EmulatedFp4(library, shape, random_weights(shape, "cpu"))
    out, bad, others = layer(x, logits, config), torch.tensor(BAD), torch.ones(40, dtype=torch.bool)
    assert out[bad].isnan().all()
    bf16 = Emulated(library, shape, random_weights(shape, "cpu"))(x, logits, BF16_CONFIG)
    assert torch.equal(out[OVERFLOWS].isfinite(), bf16[OVERFLOWS].isfinite())
    others[bad] = others[OVERFLOWS] = False
    right = reference(random_weights(shape, "cpu"), x[others], *topk_softmax(logits[others], 2), shape.activation)
    error = (out[others].double() - right).norm(dim=1) / right.norm(dim=1)
    assert error.max() <= (0.4, 0.12, 5e-3, 2.5e-3)[config // 2], error
    x[bad] = 0
    assert torch.equal(layer(x, logits, config)[others], out[others])


@pytest.mark.usefixtures("one_thread")  # a child has none of its parent's threads
@pytest.mark.parametrize("config", [6, 7], ids=[CONFIGS[6], CONFIGS[7]])
def test_a_block_that_never_arrives_ends_the_kernel(
    library: ctypes.CDLL, config: int, capfd: pytest.CaptureFixture[str]
):
    """As of the other kernels: with an error, by those who wait for the activations that it was to make."""
    shape = MoEShape(4, 4, 320, 96, 2)
    x, logits = inputs(shape, 12, 1)
    layer = EmulatedFp4(library, shape, random_weights(shape, "cpu"))
    assert_a_lost_block_traps(library, lambda: layer(x, logits, config), capfd)
