# SPDX-License-Identifier: Apache-2.0
"""The native router on this GPU: against float64, in CUDA graphs and torch.compile, and its arguments' errors."""

import pytest
import torch

from vllm_mxfp4_sm120.backends.native import Native, library
from vllm_mxfp4_sm120.moe import MoEShape
from vllm_mxfp4_sm120.platform import Machine

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
if (reason := Native.why_not(Machine.here(), MoEShape(8, 8, 64, 64, 2))) is not None:
    pytest.skip(reason, allow_module_level=True)


def router(tokens: int, experts: int, hidden: int):
    generator = torch.Generator("cuda").manual_seed(tokens + experts + hidden)
    shapes = ((tokens, hidden), (experts, hidden), (experts,))
    return [torch.randn(shape, generator=generator, device="cuda").bfloat16() for shape in shapes]


@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 16, 63, 64, 65, 300])
@pytest.mark.parametrize(("experts", "hidden"), [(32, 2880), (128, 2880), (1, 8), (5, 736), (256, 9216)])
@pytest.mark.parametrize("biased", [True, False])
def test_right(tokens: int, experts: int, hidden: int, biased: bool):
    x, weight, bias = router(tokens, experts, hidden)
    bias = bias if biased else None
    out = torch.ops.mxfp4_sm120.router_logits(x, weight, bias)
    assert out.shape == (tokens, experts) and out.dtype == torch.bfloat16
    if tokens > library.limits().router_tokens:  # left to torch, which may add up in BF16
        assert torch.equal(out, torch.nn.functional.linear(x, weight, bias))
        return
    expected = x.double() @ weight.double().T + (bias.double() if biased else 0.0)
    # One rounding to BF16: at most half a unit in the last of 8 bits, and what float32 sums lose.
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-5 * hidden**0.5)


def test_the_same_bits_whatever_the_other_tokens():
    x, weight, bias = router(64, 32, 2880)
    whole = torch.ops.mxfp4_sm120.router_logits(x, weight, bias)
    for tokens in (1, 3, 16):
        assert torch.equal(torch.ops.mxfp4_sm120.router_logits(x[:tokens], weight, bias), whole[:tokens])


@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_cuda_graph(tokens: int):
    x, weight, bias = router(tokens, 32, 2880)
    expected = torch.ops.mxfp4_sm120.router_logits(x, weight, bias)
    static = torch.zeros_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.mxfp4_sm120.router_logits(static * 1, weight, bias)
    static.copy_(x)
    for _ in range(20):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)


def test_torch_compile_and_opcheck():
    compiled = torch.compile(
        lambda *given: torch.ops.mxfp4_sm120.router_logits(*given) + 1, fullgraph=True, dynamic=True
    )
    for tokens in (3, 40, 100):
        given = router(tokens, 32, 2880)
        assert torch.equal(compiled(*given), torch.ops.mxfp4_sm120.router_logits(*given) + 1)
        torch.library.opcheck(torch.ops.mxfp4_sm120.router_logits.default, tuple(given))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 63)}, "x has hidden size 63, expected a multiple of 8 up to 9216"),
        ({"weight": torch.zeros(32, 56)}, r"weight has shape \[32, 56\], expected \[32, 64\]"),
        ({"bias": torch.zeros(31)}, r"bias has shape \[31\], expected \[32\]"),
    ],
)
def test_a_wrong_argument_is_named(change: dict, message: str):
    given = dict(zip(("x", "weight", "bias"), router(3, 32, 64), strict=True))
    given = {name: tensor.bfloat16().cuda() for name, tensor in (given | change).items()}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mxfp4_sm120.router_logits(**given)
