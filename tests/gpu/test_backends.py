# SPDX-License-Identifier: Apache-2.0
"""Every backend that says it can run on this GPU is right on it, and the capturable ones inside a CUDA graph."""

import pytest
import torch

from tests.support.layers import random_inputs, random_weights
from vllm_mxfp4_sm120 import proof
from vllm_mxfp4_sm120.backends import registry
from vllm_mxfp4_sm120.moe import Activation, MoEShape
from vllm_mxfp4_sm120.platform import Machine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

SHAPES = {
    "20b": MoEShape(32, 32, 2880, 2880, 4),
    "20b, tensor parallel 4": MoEShape(32, 32, 2880, 736, 4),
    "120b, 1 of 4 expert ranks": MoEShape(128, 32, 2880, 2880, 4),
    "odd blocks": MoEShape(8, 8, 96, 160, 2),
    "no bias, SiLU": MoEShape(8, 8, 512, 384, 2, has_bias=False, activation=Activation.SILU),
}


@pytest.fixture(params=registry.NAMES)
def backend(request):
    return registry.load(request.param)


def skip_unless_ready(backend, shape):
    machine = Machine.here()
    reason = machine.why_unsupported() or backend.why_not(machine, shape)
    if reason is not None:
        pytest.skip(f"{backend.name}: {reason}")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_right(backend, shape):
    skip_unless_ready(backend, shape)
    small = proof.problem_shape(Machine.here(), shape)
    assert proof.solve(backend, small, "cuda").reason is None


def test_proves_itself_in_a_process_of_its_own(backend):
    """As it must before it may serve: there nothing has been imported or loaded yet."""
    shape = SHAPES["odd blocks"]
    skip_unless_ready(backend, shape)
    assert proof.solve_in_child(backend, shape, "cuda", seconds=120).reason is None


@pytest.mark.parametrize("tokens", [1, 5, 64, 700])
def test_the_same_bits_in_a_cuda_graph(backend, tokens):
    shape = MoEShape(8, 8, 2880, 2880, 4)
    skip_unless_ready(backend, shape)
    if not backend.capturable:
        pytest.skip(f"{backend.name} can't be captured")
    layer = backend(shape)
    prepared = layer.prepare(random_weights(shape, "cuda"))
    x, logits = random_inputs(shape, tokens, "cuda")
    eager = layer.forward_logits(prepared, x, logits)
    static_x, static_logits = torch.zeros_like(x), torch.zeros_like(logits)
    layer.forward_logits(prepared, static_x, static_logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.forward_logits(prepared, static_x, static_logits)
    static_x.copy_(x)
    static_logits.copy_(logits)
    for _ in range(3):
        graph.replay()
        assert torch.equal(out, eager)
