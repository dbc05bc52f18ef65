# SPDX-License-Identifier: Apache-2.0
"""The native kernels inside torch on a GPU: graphs, streams, torch.compile, memory, and arguments that are wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tests.gpu.native_layer import Layer, inputs, op_arguments, real_weights, run_op, why_not
from vllm_mxfp4_sm120.backends.native import Native
from vllm_mxfp4_sm120.moe import MoEShape, topk_softmax

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer(MoEShape(16, 16, 736, 672, 4))


# ---- inside torch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 8, 16, 64, 300])
def test_cuda_graph(layer: Layer, tokens: int):
    x, logits = inputs(layer.shape, tokens)
    layer(x, logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x, logits)
    for seed in range(5):
        new_x, new_logits = inputs(layer.shape, tokens, seed)
        x.copy_(new_x)
        logits.copy_(new_logits)
        graph.replay()
        assert torch.equal(out, layer(new_x, new_logits))


def test_a_graph_survives_a_larger_call(layer: Layer):
    """A workspace that grew later must not take the one that a graph writes to. On a stream of its own: a small one."""
    with torch.cuda.stream(torch.cuda.Stream()):
        x, logits = inputs(layer.shape, 8)
        expected = layer(x, logits)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            out = layer(x, logits)
        layer(*inputs(layer.shape, 2000))
        junk = [torch.full((1 << 20,), -1, dtype=torch.int32, device="cuda") for _ in range(16)]
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
        assert all(bool((tensor == -1).all()) for tensor in junk)


CAPTURE_TOO_LARGE = """
import torch
from tests.gpu.native_layer import Layer, inputs
from vllm_mxfp4_sm120.moe import MoEShape
layer = Layer(MoEShape(16, 16, 736, 672, 4))
x, logits = inputs(layer.shape, 64)
layer(x[:1], logits[:1])
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        layer(x, logits)
except RuntimeError as error:
    print(error)
torch.cuda.synchronize()
layer.check(x, logits)
"""


def test_the_workspace_does_not_grow_inside_a_capture():
    """In a process of its own, whose workspaces are known."""
    said = subprocess.run([sys.executable, "-c", CAPTURE_TOO_LARGE], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "run the layer once with as many tokens before capturing" in said.stdout


def test_two_streams_have_a_workspace_each(layer: Layer):
    """Calls that run at the same time don't meet in the exchange."""
    given = [inputs(layer.shape, tokens, seed) for seed, tokens in enumerate((4, 8, 40))]
    expected = [layer(*one) for one in given]
    streams = [torch.cuda.Stream() for _ in given]
    torch.cuda.synchronize()
    for _ in range(50):
        outs = []
        for stream, one in zip(streams, given, strict=True):
            with torch.cuda.stream(stream):
                outs.append(layer(*one))
        torch.cuda.synchronize()
        assert all(torch.equal(out, right) for out, right in zip(outs, expected, strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(layer: Layer, backend: str):
    compiled = torch.compile(lambda x, logits: layer(x * 2, logits) + 1, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (3, 8, 40):
        x, logits = inputs(layer.shape, tokens)
        assert torch.equal(compiled(x, logits), layer(x * 2, logits) + 1)


@pytest.mark.parametrize("tokens", [1, 8, 16, 40])
def test_opcheck(layer: Layer, tokens: int):
    x, logits = inputs(layer.shape, tokens)
    arguments = op_arguments(layer, x, logits)
    torch.library.opcheck(torch.ops.mxfp4_sm120.moe_layer.default, (), arguments)


def test_another_stream(layer: Layer):
    """The kernels queue behind what made their input, on the stream that is current."""
    x, logits = inputs(layer.shape, 64)
    later = x.neg()
    expected = layer(later, logits)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10_000_000)
        x.copy_(later)
        out = layer(x, logits)
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


def test_no_host_sync_and_nothing_allocated_but_the_output(layer: Layer):
    for tokens in (1, 8, 64, 300):
        x, logits = inputs(layer.shape, tokens)
        ids, gates = topk_softmax(logits, layer.shape.top_k)
        ids = ids.int()
        layer(x, logits)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = layer(x, logits), layer.backend.forward(layer.prepared, x, ids, gates)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == len(out)


def test_preparing_needs_a_fraction_of_a_layer_more():
    shape = MoEShape(32, 32, 1440, 1440, 4)
    weights = real_weights(shape)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    prepared = Native(shape).prepare(weights)
    size = 32 * shape.packed_bytes_per_expert
    assert prepared["w13"].data_ptr() == weights.w13.data_ptr() and prepared["w2"].data_ptr() == weights.w2.data_ptr()
    assert prepared["w13"].numel() + prepared["w2"].numel() == size
    assert torch.cuda.max_memory_allocated() - before < size // 2
    assert torch.cuda.memory_allocated() == before


# ---- arguments ------------------------------------------------------------------------------------------------------


def misaligned(tensor: Tensor) -> Tensor:
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)[1:]
    return room.view(tensor.shape).copy_(tensor)


def every_second_row(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor]).view(2, *tensor.shape).transpose(0, 1).flatten(0, 1)[::2]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t.float(), "x is float32, expected bfloat16"),
        ("x", lambda t: t[:, :-32].contiguous(), "w13 has shape"),
        ("x", lambda t: t[:, :-1].contiguous(), "x has hidden size 735, expected a multiple of 32"),
        ("x", lambda t: t.view(-1), "x has 1 dimensions, expected 2"),
        ("x", lambda t: t.T.contiguous().T, "x is not contiguous"),
        ("x", misaligned, "x is not aligned, expected an address that is a multiple of 16"),
        ("w13", lambda t: t.cpu(), "w13 is on the CPU, expected cuda:0 as x"),
        ("w13", lambda t: t.view(torch.int8), "w13 is int8, expected uint8"),
        ("w13", misaligned, "w13 is not aligned"),
        ("w2", lambda t: t[:-1], "w13 has shape .16, 42, 23, 544., expected .15, 42, 23, 544."),
        ("w2", lambda t: t[..., :-1], "w2 has shape"),
        ("w13_bias", lambda t: t.float(), "w13_bias is float32, expected bfloat16"),
        ("w13_bias", lambda t: t[:, 1:], "w13_bias has shape"),
        ("w2_bias", lambda t: every_second_row(t), "w2_bias is not contiguous"),
        ("router_logits", lambda t: t.half(), "router_logits is float16, expected bfloat16 or float32"),
        ("router_logits", lambda t: t[:, :-1], "router_logits has shape .9, 15., expected .9, 16."),
        ("router_logits", lambda t: None, "router_logits and topk_ids are both missing, expected one"),
        ("topk_ids", lambda t: torch.zeros(9, 4, dtype=torch.int32, device="cuda"), "are both given, expected one"),
        ("topk_weights", lambda t: torch.zeros(9, 4, device="cuda"), "topk_weights is given, expected with topk_ids"),
        (
            "expert_map",
            lambda t: torch.zeros(16, dtype=torch.int64, device="cuda"),
            "expert_map is int64, expected int32",
        ),
        (
            "expert_map",
            lambda t: torch.zeros(15, dtype=torch.int32, device="cuda"),
            "expert_map has shape .15., expected .16.",
        ),
        ("num_experts", lambda n: 257, "num_experts is 257, expected 1 to 256"),
        ("num_experts", lambda n: 15, "w2 holds 16 experts, expected 1 to num_experts .15."),
        ("num_experts", lambda n: 17, "router_logits has shape .9, 16., expected .9, 17."),
        ("top_k", lambda k: 9, "top_k is 9, expected 1 to 8"),
        ("config", lambda c: 1000, "config is 1000, expected 0 to 8, or -1 for the rule's"),
        ("config", lambda c: 0, "config decode takes up to 8 tokens, not 9"),
    ],
)
def test_a_wrong_argument_is_named(layer: Layer, name: str, change, message: str):
    x, logits = inputs(layer.shape, 9)
    arguments = op_arguments(layer, x, logits)
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mxfp4_sm120.moe_layer(**arguments)
    layer.check(x, logits)


def test_a_missing_expert_map_is_named(layer: Layer):
    x, logits = inputs(layer.shape, 9)
    changes = {name: layer.prepared[name][:8] for name in ("w13", "w2", "w13_bias", "w2_bias")}
    with pytest.raises(RuntimeError, match="expert_map is missing, expected since only 8 of 16 experts are here"):
        run_op(layer, x, logits, **changes)
