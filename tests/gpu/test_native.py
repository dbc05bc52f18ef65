# SPDX-License-Identifier: Apache-2.0
"""The native kernels on a GPU, against float64 on the same packed weights.

`-k small_shapes` are the shapes for compute-sanitizer: every kernel, few blocks.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vllm_mxfp4_sm120.backends.native import Native, library
from vllm_mxfp4_sm120.backends.native.layout import MAX_SCALE, MIN_SCALE
from vllm_mxfp4_sm120.moe import Activation, MoEShape, MoEWeights, reference, topk_softmax
from vllm_mxfp4_sm120.platform import Machine


def why_not() -> str | None:
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU"
    return Native.why_not(Machine.here(), MoEShape(8, 8, 64, 64, 2))


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

# Against a reference that rounds the activation between the GEMMs to BF16 as the kernels do; the output's own rounding
# makes 1.65e-3. (Against one that rounds nothing the two roundings make 2.33e-3.)
TOLERANCE = 2.0e-3
# Around every change of kernel: all tokens as columns, gathered by expert, tiles of 24 to 144 tokens an expert.
TOKENS = (1, 2, 3, 8, 9, 16, 17, 33, 64, 150, 513)


def random_weights(shape: MoEShape, low: int = 118, high: int = 124, seed: int = 0) -> MoEWeights:
    """Random codes, and scales low..high: by default those of real checkpoints, weights around 0.02."""
    generator = torch.Generator("cuda").manual_seed(seed)
    weights = MoEWeights.empty(shape, "cuda")
    for codes, scales in ((weights.w13, weights.w13_scale), (weights.w2, weights.w2_scale)):
        codes.copy_(torch.randint(0, 256, codes.shape, dtype=torch.uint8, device="cuda", generator=generator))
        scales.copy_(torch.randint(low, high + 1, scales.shape, dtype=torch.uint8, device="cuda", generator=generator))
    for bias in (weights.w13_bias, weights.w2_bias):
        if bias is not None:
            bias.normal_(generator=generator)
    return weights


def inputs(shape: MoEShape, tokens: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(tokens, shape.hidden_size, device="cuda", generator=generator).bfloat16()
    return x, torch.randn(tokens, shape.num_experts, device="cuda", generator=generator)


def error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


class Layer:
    """A backend with its weights, and the answers it should give."""

    def __init__(self, shape: MoEShape, weights: MoEWeights | None = None) -> None:
        self.shape, self.weights = shape, weights or random_weights(shape)
        self.backend = Native(shape)
        self.prepared = self.backend.prepare(self.weights.clone())

    def __call__(self, x: Tensor, logits: Tensor) -> Tensor:
        return self.backend.forward_logits(self.prepared, x, logits)

    def expected(self, x: Tensor, logits: Tensor) -> Tensor:
        ids, gates = topk_softmax(logits, self.shape.top_k)
        return reference(self.weights, x, ids, gates, self.shape.activation, activation_dtype=torch.bfloat16)

    def check(self, x: Tensor, logits: Tensor) -> None:
        out = self(x, logits)
        assert out.shape == x.shape and out.dtype == torch.bfloat16
        # A few dozen outputs are no average: there one activation that rounds to the other neighbour shows.
        assert error(out, self.expected(x, logits)) <= (TOLERANCE if out.numel() >= 1000 else 2.6e-3)


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer(MoEShape(16, 16, 736, 672, 4))


# ---- right answers --------------------------------------------------------------------------------------------------

SMALL = (
    MoEShape(1, 1, 32, 32, 1),
    MoEShape(4, 4, 64, 96, 2, has_bias=False),
    MoEShape(8, 8, 160, 64, 8),
    MoEShape(5, 5, 96, 32, 3, activation=Activation.SILU),
)
LARGE = (
    MoEShape(32, 32, 2880, 2880, 4),  # gpt-oss-20b
    MoEShape(32, 32, 2880, 1440, 4),  # its half, TP2
    MoEShape(16, 16, 2880, 736, 4),  # TP4
    MoEShape(16, 16, 2880, 672, 4),
    MoEShape(128, 128, 736, 672, 4),
    MoEShape(256, 256, 256, 128, 8, has_bias=False),
    MoEShape(4, 4, 4096, 1440, 2, activation=Activation.SILU),
    MoEShape(2, 2, 7168, 4096, 1),
)


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 8, 9, 16, 17, 40, 130])
def test_small_shapes(shape: MoEShape, tokens: int):
    layer = Layer(shape)
    x, logits = inputs(shape, tokens)
    if tokens:
        layer.check(x, logits)
        layer.check(x, logits.bfloat16())
    else:
        assert layer(x, logits).shape == (0, shape.hidden_size)


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_shapes_of_models(shape: MoEShape):
    layer = Layer(shape)
    for tokens in TOKENS:
        layer.check(*inputs(shape, tokens))


def test_tokens_of_a_long_prompt():
    layer = Layer(MoEShape(32, 32, 2880, 2880, 4))
    layer.check(*inputs(layer.shape, 4096))


def test_many_tokens_in_parts(layer: Layer):
    x, logits = inputs(layer.shape, library.limits().tokens + 300)
    ids, gates = topk_softmax(logits, layer.shape.top_k)
    layer.check(x, logits)
    assert error(layer.backend.forward(layer.prepared, x, ids, gates), layer.expected(x, logits)) <= TOLERANCE


def test_given_experts_are_those_that_logits_choose(layer: Layer):
    for tokens in TOKENS:
        x, logits = inputs(layer.shape, tokens)
        ids, gates = topk_softmax(logits, layer.shape.top_k)
        for dtype in (torch.int32, torch.int64):
            out = layer.backend.forward(layer.prepared, x, ids.to(dtype), gates)
            assert error(out, layer.expected(x, logits)) <= TOLERANCE


@pytest.mark.parametrize("tokens", [5, 150])
def test_odd_logits(layer: Layer, tokens: int):
    """Masked experts, huge and tiny logits: the k largest all the same, and a softmax that doesn't overflow."""
    x, logits = inputs(layer.shape, tokens)
    logits[:, ::3] = -torch.inf
    layer.check(x, logits)
    layer.check(x, logits * 1e4)
    layer.check(x, logits - 1e30)


@pytest.mark.parametrize("tokens", [8, 64, 513])
def test_skewed_routing(layer: Layer, tokens: int):
    """Half of all tokens on the same experts; all tokens on the same; an expert for every token."""
    x, logits = inputs(layer.shape, tokens)
    logits[: tokens // 2, 2:4] += 100
    layer.check(x, logits)
    logits[:, 5:9] += 1000
    layer.check(x, logits)
    ids = torch.arange(tokens * layer.shape.top_k, device="cuda").view(tokens, -1) % layer.shape.num_experts
    gates = torch.rand(tokens, layer.shape.top_k, device="cuda")
    out = layer.backend.forward(layer.prepared, x, ids, gates)
    assert error(out, reference(layer.weights, x, ids, gates, activation_dtype=torch.bfloat16)) <= TOLERANCE


@pytest.mark.parametrize("tokens", [1, 8, 16, 64, 300])
@pytest.mark.parametrize("scales", ["whole range", "smallest", "largest", "equal", "alternating", "zero rows"])
def test_scales(scales: str, tokens: int):
    shape = MoEShape(8, 8, 320, 352, 2, has_bias=False)
    low, high = {"whole range": (MIN_SCALE, MAX_SCALE), "equal": (120, 120), "alternating": (107, 137)}.get(
        scales, (118, 124)
    )
    weights = random_weights(shape, low, high)
    if scales == "alternating":
        for scale in (weights.w13_scale, weights.w2_scale):
            scale[..., ::2], scale[..., 1::2] = 127 - 20, 127 + 10
    if scales == "zero rows":
        weights.w13[:, ::3] = 0
        weights.w13_scale[:, ::3] = 0  # outside of what the kernels multiply with, but there is nothing to multiply
        weights.w2[:, 1::3] = 0x88
    if scales in ("smallest", "largest"):
        # In w2 alone: in both, the smallest would leave gates of zero, and the largest saturate all of them.
        weights.w2_scale.fill_(MIN_SCALE if scales == "smallest" else MAX_SCALE)
    Layer(shape, weights).check(*inputs(shape, tokens))


def test_every_configuration_gives_the_same_answer(layer: Layer):
    """The table's other entries are there to be tuned to; each must be right wherever it agrees to run."""
    table = library.configurations()
    ran = set()
    for tokens in (3, 8, 50, 150):
        x, logits = inputs(layer.shape, tokens)
        values = tokens * layer.shape.top_k * max(layer.shape.hidden_size, layer.shape.intermediate_size)
        for config, entry in enumerate(table):
            if tokens > entry.tokens or values > entry.values:
                with pytest.raises(RuntimeError, match=f"config {entry.name} takes up to"):
                    run_op(layer, x, logits, config=config)
                continue
            ran.add(config)
            out = run_op(layer, x, logits, config=config)
            assert error(out, layer.expected(x, logits)) <= TOLERANCE, f"{entry.name}, {tokens} tokens"
    assert ran == set(range(len(table)))


def run_op(layer: Layer, x: Tensor, logits: Tensor, **changes) -> Tensor:
    return torch.ops.mxfp4_sm120.moe_layer(**{**op_arguments(layer, x, logits), **changes})


def op_arguments(layer: Layer, x: Tensor, logits: Tensor) -> dict:
    return {
        "x": x,
        "w13": layer.prepared["w13"],
        "w2": layer.prepared["w2"],
        "w13_bias": layer.prepared.get("w13_bias"),
        "w2_bias": layer.prepared.get("w2_bias"),
        "router_logits": logits,
        "topk_ids": None,
        "topk_weights": None,
        "expert_map": None,
        "num_experts": layer.shape.num_experts,
        "top_k": layer.shape.top_k,
        "swiglu_oai": True,
        "config": -1,
    }


# ---- a token's answer is its own ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [2, 8, 16, 33, 150])
def test_other_tokens_values_do_not_matter(layer: Layer, tokens: int):
    x, logits = inputs(layer.shape, tokens)
    first = layer(x, logits)
    x[1:] = torch.randn_like(x[1:]) * 50
    assert torch.equal(layer(x, logits)[0], first[0])


@pytest.mark.parametrize("tokens", [1, 8, 16, 64, 513])
def test_the_same_bits_a_thousand_times(layer: Layer, tokens: int):
    x, logits = inputs(layer.shape, tokens)
    first = layer(x, logits)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        different += (layer(x, logits) != first).sum()
    assert int(different) == 0


# ---- expert parallel ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 8, 16, 33, 150])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_sum_to_the_whole(layer: Layer, tokens: int, ranks: int):
    x, logits = inputs(layer.shape, tokens)
    ids, gates = topk_softmax(logits, layer.shape.top_k)
    total = torch.zeros(x.shape, dtype=torch.float64, device="cuda")
    for rank in range(ranks):
        # Not in order, as a load balancer may place them.
        mine = torch.arange(rank, layer.shape.num_experts, ranks, device="cuda").flip(0)
        expert_map = torch.full((layer.shape.num_experts,), -1, dtype=torch.int32, device="cuda")
        expert_map[mine] = torch.arange(len(mine), dtype=torch.int32, device="cuda")
        weights = MoEWeights(**{name: None if t is None else t[mine] for name, t in vars(layer.weights).items()})
        part = Native(replace(layer.shape, local_experts=len(mine)))
        prepared = part.prepare(weights.clone())
        expected = reference(weights, x, ids, gates, expert_map=expert_map, activation_dtype=torch.bfloat16)
        for out in (
            part.forward_logits(prepared, x, logits, expert_map),
            part.forward(prepared, x, ids, gates, expert_map),
        ):
            away = expected.abs().amax(1) == 0
            assert bool((out[away] == 0).all())
            if not bool(away.all()):
                assert error(out, expected) <= TOLERANCE
        total += out
    assert error(total, layer.expected(x, logits)) <= 1.5 * TOLERANCE


def test_a_rank_without_any_chosen_expert_gives_zeros(layer: Layer):
    shape = replace(layer.shape, local_experts=2)
    part = Native(shape)
    prepared = part.prepare(random_weights(shape))
    expert_map = torch.full((shape.num_experts,), -1, dtype=torch.int32, device="cuda")
    expert_map[:2] = torch.arange(2, dtype=torch.int32, device="cuda")
    for tokens in (1, 8, 150):
        x, logits = inputs(shape, tokens)
        logits[:, :2] = -torch.inf
        torch.full_like(x, 7)  # what the allocator hands out next is not zero
        assert bool((part.forward_logits(prepared, x, logits, expert_map) == 0).all())


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
from tests.gpu.test_native import Layer, inputs
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
    weights = random_weights(shape)
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
