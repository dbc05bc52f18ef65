# SPDX-License-Identifier: Apache-2.0
"""The weight-only path: against float64, against the upcast, its memory, and every odd routing."""

import weakref
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.layers import random_weights
from vllm_mxfp4_sm120 import mxfp4
from vllm_mxfp4_sm120.backends import tiled
from vllm_mxfp4_sm120.backends.tiled import Tiled
from vllm_mxfp4_sm120.backends.upcast import Upcast
from vllm_mxfp4_sm120.moe import Activation, MoEShape, MoEWeights, reference, topk_softmax


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """In problems this small, threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Problem:
    """A layer and a call of it, small enough to print: the tensors follow from the seed."""

    shape: MoEShape
    tokens: int
    any_experts: bool  # the same one twice in a token included
    first_elsewhere: bool
    id_dtype: torch.dtype
    seed: int

    def tensors(self) -> tuple[MoEWeights, Tensor, Tensor, Tensor, Tensor | None]:
        """Weights, x, topk_ids, topk_weights, expert_map."""
        shape, experts = self.shape, self.shape.num_experts
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.tokens, shape.hidden_size, generator=generator).bfloat16()
        ids, gates = topk_softmax(torch.randn(self.tokens, experts, generator=generator), shape.top_k)
        if self.any_experts:
            ids = torch.randint(0, experts, ids.shape, generator=generator)
        weights = random_weights(shape, "cpu", self.seed)
        expert_map = None
        if self.first_elsewhere:
            expert_map = torch.arange(-1, experts - 1, dtype=torch.int32)
            weights = MoEWeights(**{name: None if t is None else t[1:] for name, t in vars(weights).items()})
        return weights, x, ids.to(self.id_dtype), gates, expert_map


@st.composite
def problems(draw) -> Problem:
    experts = draw(st.integers(1, 6))
    shape = MoEShape(
        num_experts=experts,
        local_experts=experts,
        hidden_size=32 * draw(st.integers(1, 7)),
        intermediate_size=32 * draw(st.integers(1, 5)),
        top_k=draw(st.integers(1, min(4, experts))),
        has_bias=draw(st.booleans()),
        activation=draw(st.sampled_from(Activation)),
    )
    return Problem(
        shape,
        tokens=draw(st.integers(0, 12)),
        any_experts=draw(st.booleans()),
        first_elsewhere=draw(st.booleans()),
        id_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        seed=draw(st.integers(0, 2**31)),
    )


def run(backend, shape, weights, x, ids, gates, expert_map) -> Tensor:
    layer = backend(shape)
    return layer.forward(layer.prepare(weights), x, ids, gates, expert_map)


def unit_errors(answer: Tensor, expected: Tensor) -> Tensor:
    """Absolute errors, float64, of outputs scaled so that the largest that was expected is 1."""
    assert answer.shape == expected.shape and answer.dtype == torch.bfloat16
    expected = expected.double()
    largest = expected.abs().max() if expected.numel() else expected.new_ones(())
    return (answer.double() - expected).abs() / largest.clamp(min=1e-30)


def rms(errors: Tensor) -> float:
    return errors.square().mean().sqrt().item() if errors.numel() else 0.0


def assert_close(answer: Tensor, expected: Tensor) -> None:
    """max_abs < 1e-2 and RMS < 3e-3 on unit-scaled outputs."""
    errors = unit_errors(answer, expected)
    assert (errors < 1e-2).all() and rms(errors) < 3e-3


@settings(max_examples=100)
@given(problems(), st.sampled_from([(360, 2880), (32, 32), (48, 64), (7, 96)]))
def test_tiled_is_the_reference(problem, tile):
    weights, x, ids, gates, expert_map = problem.tensors()
    expected = reference(weights, x, ids, gates, problem.shape.activation, expert_map)
    with mock.patch.multiple(tiled, TILE_ROWS=tile[0], TILE_K=tile[1]):
        assert_close(run(Tiled, problem.shape, weights, x, ids, gates, expert_map), expected)


@settings(max_examples=50)
@given(problems())
def test_weight_only_is_the_upcast_within_bf16_rounding(problem):
    """A rounding is off by 2^-8 of a value at most. The upcast has two more, one for each matmul; both end with one."""
    packed, dense = (run(backend, problem.shape, *problem.tensors()) for backend in (Tiled, Upcast))
    errors = unit_errors(packed, dense)
    assert (errors < 4 * 2**-8).all() and rms(errors) < 2**-8


@pytest.mark.parametrize("tokens", [1, 30])
def test_gpt_oss_sizes(tokens):
    """The real tiles on the real sizes, against the bar counted from outputs whose mean square, not largest, is 1."""
    shape = MoEShape(num_experts=2, local_experts=2, hidden_size=2880, intermediate_size=2880, top_k=1)
    weights = random_weights(shape, "cpu")
    x = torch.randn(tokens, 2880, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids, gates = torch.ones(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)
    answer, expected = run(Tiled, shape, weights, x, ids, gates, None), reference(weights, x, ids, gates)
    assert_close(answer, expected)
    assert rms((answer - expected) / expected.square().mean().sqrt()) < 3e-3


SHAPE = MoEShape(num_experts=8, local_experts=8, hidden_size=96, intermediate_size=160, top_k=4)


def test_the_same_bits_on_every_run_and_however_the_inputs_lie():
    layer = Tiled(SHAPE)
    prepared = layer.prepare(random_weights(SHAPE, "cpu"))
    x = torch.randn(50, 96).bfloat16()
    ids, gates = topk_softmax(torch.randn(50, 8), 4)
    once = layer.forward(prepared, x, ids, gates)
    assert torch.equal(layer.forward(prepared, x, ids, gates), once)
    strided_x = torch.stack((x, x * 9), dim=-1)[..., 0]
    strided_ids = torch.stack((ids, ids + 1), dim=-1).int()[..., 0]
    strided_gates = gates.T.contiguous().T
    assert not (strided_x.is_contiguous() or strided_ids.is_contiguous() or strided_gates.is_contiguous())
    assert torch.equal(layer.forward(prepared, strided_x, strided_ids, strided_gates), once)


def test_logits_and_their_routing_give_the_same():
    layer = Tiled(SHAPE)
    prepared = layer.prepare(random_weights(SHAPE, "cpu"))
    x, logits = torch.randn(5, 96).bfloat16(), torch.randn(5, 8)
    assert torch.equal(layer.forward_logits(prepared, x, logits), layer.forward(prepared, x, *topk_softmax(logits, 4)))


def test_packed_tensors_stay_as_they_are():
    weights = random_weights(SHAPE, "cpu")
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in vars(weights).items()}
    layer = Tiled(SHAPE)
    prepared = layer.prepare(weights)
    layer.forward(prepared, torch.randn(5, 96).bfloat16(), *topk_softmax(torch.randn(5, 8), 4))
    assert prepared.keys() == before.keys()
    for name, (address, value) in before.items():
        assert prepared[name].data_ptr() == address and torch.equal(prepared[name], value)


def test_only_chosen_experts_are_decoded():
    """The others hold NaN scales, which would show."""
    weights = random_weights(SHAPE, "cpu")
    weights.w13_scale[4:] = weights.w2_scale[4:] = 255
    layer = Tiled(SHAPE)
    gates = torch.full((3, 4), 0.25)
    ids = torch.arange(4).repeat(3, 1)
    assert layer.forward(layer.prepare(weights), torch.randn(3, 96).bfloat16(), ids, gates).isfinite().all()
    assert layer.forward(layer.prepare(weights), torch.randn(3, 96).bfloat16(), ids + 1, gates).isnan().any()


class Watch(TorchDispatchMode):
    """Counts, after every operation, the values in floating tensors that are alive and were made since the start."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[weakref.ref] = []
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.alive.append(weakref.ref(tensor))
        storages = {}
        self.alive = [ref for ref in self.alive if ref() is not None]
        for ref in self.alive:
            tensor = ref()
            if tensor is not None:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.itemsize
        self.peak = max(self.peak, sum(storages.values()))
        return result


def test_no_expert_is_ever_whole_in_bf16():
    """At GPT-OSS's sizes, at no moment of a forward pass do decoded weights beyond one tile exist."""
    shape = MoEShape(num_experts=2, local_experts=2, hidden_size=2880, intermediate_size=2880, top_k=2)
    layer = Tiled(shape)
    prepared = layer.prepare(random_weights(shape, "cpu"))
    x, ids, gates = torch.randn(1, 2880).bfloat16(), torch.tensor([[1, 0]]), torch.tensor([[0.5, 0.5]])
    with Watch() as watch:
        layer.forward(prepared, x, ids, gates)
    tile, matrix = tiled.TILE_ROWS * tiled.TILE_K, 2880 * 2880
    small = tile // 16  # activations of one token, a tile's scales, the tables
    assert tile <= watch.peak <= tile + small < matrix


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_watch_sees_a_whole_expert(dtype):
    """What the test above would say of a backend that decodes an expert at once."""
    codes, scales = torch.zeros(1440, 720, dtype=torch.uint8), torch.zeros(1440, 45, dtype=torch.uint8)
    with Watch() as watch:
        mxfp4.dequantize(codes, scales, dtype)
    assert watch.peak >= 1440 * 1440
    with Watch() as watch:
        Upcast(SHAPE).prepare(random_weights(SHAPE, "cpu"))
    assert watch.peak >= 8 * 3 * 96 * 160
