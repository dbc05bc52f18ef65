# SPDX-License-Identifier: Apache-2.0
"""The weight-only path on a GPU: the same answers as the reference, on one stream and on several, and its memory."""

import pytest
import torch

from tests.support.layers import random_weights
from vllm_mxfp4_sm120.backends import tiled
from vllm_mxfp4_sm120.backends.tiled import Tiled
from vllm_mxfp4_sm120.moe import MoEShape, reference, topk_softmax

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

SHAPE = MoEShape(num_experts=8, local_experts=8, hidden_size=2880, intermediate_size=2880, top_k=4)
TOKENS = (0, 1, 7, 300)


@pytest.fixture(scope="module")
def layer():
    return Tiled(SHAPE), random_weights(SHAPE, "cuda")


def inputs(tokens: int):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, SHAPE.hidden_size, generator=generator).bfloat16().cuda()
    return x, *topk_softmax(torch.randn(tokens, SHAPE.num_experts, generator=generator).cuda(), SHAPE.top_k)


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_reference_on_any_number_of_streams(layer, tokens, streams, monkeypatch):
    backend, weights = layer
    x, ids, gates = inputs(tokens)
    monkeypatch.setenv("MXFP4_SM120_MOE_STREAMS", str(streams))
    answer = backend.forward(backend.prepare(weights), x, ids, gates)
    expected = reference(weights, x, ids, gates)
    assert answer.shape == x.shape and answer.dtype == torch.bfloat16
    if tokens:
        errors = (answer - expected).abs() / expected.abs().max()
        assert errors.max() < 1e-2 and errors.square().mean().sqrt() < 3e-3


def test_streams_change_no_bit(layer, monkeypatch):
    backend, weights = layer
    answers = []
    for streams in (1, 2, 5, 5):
        monkeypatch.setenv("MXFP4_SM120_MOE_STREAMS", str(streams))
        answers.append(backend.forward(backend.prepare(weights), *inputs(300)))  # the last inputs' memory is used again
    assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_one_token_takes_no_more_than_a_tile(layer):
    """The tile in BF16, and while it is decoded its codes as int32 indices: two bytes each for every value."""
    backend, weights = layer
    x, ids, gates = inputs(1)
    backend.forward(backend.prepare(weights), x, ids, gates)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    backend.forward(backend.prepare(weights), x, ids, gates)
    tile = tiled.TILE_ROWS * tiled.TILE_K * 2
    assert torch.cuda.max_memory_allocated() - before < 2.5 * tile < 2880 * 2880 * 2
