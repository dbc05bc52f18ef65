# SPDX-License-Identifier: Apache-2.0
"""The FP4 kernels on a GPU: on SM 12.x, or with their twin on any card, from a library built for it:

kernels/build.sh -- -DMXFP4_SM120_FP4_TWIN=ON
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.layers import random_weights
from vllm_mxfp4_sm120.backends.native import Native, fp4, library
from vllm_mxfp4_sm120.moe import MoEShape, reference, topk_softmax
from vllm_mxfp4_sm120.platform import Machine

CONFIGS = range(8)
# Of a layer's output against float64, by terms.
TOLERANCE = {1: 0.25, 2: 3e-2, 3: 3.2e-3, 4: 2.1e-3}
GPT_OSS = MoEShape(32, 32, 2880, 2880, 4)


@pytest.fixture(scope="module", autouse=True)
def _fp4_here() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    capability = Machine.here().capability
    if library.find(capability) is None:
        pytest.skip("the CUDA library isn't built")
    library.load()
    if (reason := fp4.why_not(capability)) is not None:
        pytest.skip(reason)


def problem(shape: MoEShape, tokens: int, seed: int = 0) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Weights prepared, x, topk_ids and topk_weights, on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, shape.hidden_size, generator=generator).bfloat16()
    ids, gates = topk_softmax(torch.randn(tokens, shape.num_experts, generator=generator), shape.top_k)
    prepared = Native(shape).prepare(random_weights(shape, "cuda").clone())
    return prepared, x.cuda(), ids.int().contiguous().cuda(), gates.contiguous().cuda()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        (GPT_OSS, 300),
        (MoEShape(32, 32, 2880, 1440, 4), 1000),
        (MoEShape(8, 8, 2880, 736, 2, has_bias=False), 77),
        (MoEShape(5, 5, 96, 32, 3), 1),
        (MoEShape(3, 3, 352, 672, 1), 513),
    ],
    ids=str,
)
def test_right(config: int, shape: MoEShape, tokens: int):
    prepared, x, ids, gates = problem(shape, tokens)
    out = fp4.forward(shape, prepared, x, ids, gates, config)
    right = reference(random_weights(shape, "cuda"), x, ids.long(), gates, shape.activation)
    error = float((out.double() - right).norm() / right.norm())
    assert error <= TOLERANCE[fp4.configurations()[config].terms], error


@pytest.mark.parametrize("config", CONFIGS)
def test_the_same_bits_a_thousand_times(config: int):
    prepared, x, ids, gates = problem(GPT_OSS, 600)
    first = fp4.forward(GPT_OSS, prepared, x, ids, gates, config)
    different = sum(not torch.equal(fp4.forward(GPT_OSS, prepared, x, ids, gates, config), first) for _ in range(1000))
    assert different == 0


@pytest.mark.parametrize("config", CONFIGS)
def test_in_a_cuda_graph(config: int):
    prepared, x, ids, gates = problem(GPT_OSS, 200)
    expected = fp4.forward(GPT_OSS, prepared, x, ids, gates, config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fp4.forward(GPT_OSS, prepared, x, ids, gates, config)
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)


def test_compiled_and_checked_by_torch():
    shape = MoEShape(4, 4, 96, 96, 2)
    prepared, x, ids, gates = problem(shape, 40)
    compiled = torch.compile(lambda *given: fp4.forward(shape, prepared, *given, 4), fullgraph=True)
    assert torch.equal(compiled(x, ids, gates), fp4.forward(shape, prepared, x, ids, gates, 4))
    biases = prepared["w13_bias"], prepared["w2_bias"]
    arguments = (x, prepared["w13"], prepared["w2"], *biases, None, ids, gates, None, 4, 2, True, 4)
    torch.library.opcheck(torch.ops.mxfp4_sm120.fp4_moe_layer.default, arguments)
