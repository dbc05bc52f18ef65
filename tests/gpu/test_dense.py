# SPDX-License-Identifier: Apache-2.0
"""The dense kernels on this GPU: against float64, in CUDA graphs and torch.compile; and what the card decides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_mxfp4_sm120 import proof
from vllm_mxfp4_sm120.backends.native import library
from vllm_mxfp4_sm120.checkpoint import published_config
from vllm_mxfp4_sm120.dense import linear as operator
from vllm_mxfp4_sm120.dense import native, plan, trial
from vllm_mxfp4_sm120.dense.int8 import Int8Weights
from vllm_mxfp4_sm120.dense.linear import LinearShape
from vllm_mxfp4_sm120.platform import Machine

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
if (reason := plan.why_not(Machine.here())) is not None:
    pytest.skip(reason, allow_module_level=True)
library.load()

CONFIGS = list(enumerate(native.configurations()))
EACH = pytest.mark.parametrize(("kernel", "config"), CONFIGS, ids=[config.name for _, config in CONFIGS])
# A layer's relative error against float64 on the BF16 weights: the output's rounding, and INT8's 0.5 %.
TOLERANCE, TOLERANCE_OF_INT8 = 2e-3, 6e-3
LAYERS = plan.shapes(published_config("gpt-oss-20b"), 1, False)


def layer(rows: int, columns: int, int8: bool, seed: int = 0) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]]:
    """The weights in BF16, and weight, bias and scale as the kernels take them."""
    draw = {"generator": torch.Generator("cuda").manual_seed(seed), "device": "cuda"}
    weight = torch.randn(rows, columns, **draw).bfloat16()
    bias = torch.randn(rows, **draw).bfloat16()
    if not int8:
        return weight, (weight, bias, None)
    encoded = Int8Weights.quantize(weight)
    return weight, (encoded.codes, bias, encoded.scales)


def tokens_of(count: int, columns: int) -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator("cuda").manual_seed(count), device="cuda").bfloat16()


@EACH
@pytest.mark.parametrize("name", ["qkv_proj", "o_proj"])
def test_error_of_a_layer(kernel: int, config: native.DenseConfiguration, name: str) -> None:
    shape = LAYERS[name]
    weight, given = layer(shape.rows, shape.columns, config.int8)
    for count in (1, 5, 16, 17, 32, 33, 64, 100, 256):
        x = tokens_of(count, shape.columns)
        right = x.double() @ weight.double().T + given[1].double()
        error = float((native.linear(x, *given, kernel).double() - right).norm() / right.norm())
        assert error <= (TOLERANCE_OF_INT8 if config.int8 else TOLERANCE), count


@EACH
@pytest.mark.parametrize("rows", [1, 7, 39, 130, 257, 1000, 3000])
@pytest.mark.parametrize("blocks", [1, 2, 5, 23, 64])
def test_odd_sizes(kernel: int, config: native.DenseConfiguration, rows: int, blocks: int) -> None:
    columns = blocks * native.limits().k_multiple
    _, given = layer(rows, columns, config.int8)
    exact = given[0].double() if given[2] is None else Int8Weights(given[0], given[2]).decode(dtype=torch.float64)
    for count in (1, 9, 40, 130):
        x = tokens_of(count, columns)
        out, right = native.linear(x, *given, kernel).double(), x.double() @ exact.T + given[1].double()
        # Half a step of BF16; of a scaled weight that is rounded to BF16, as much again of each product.
        bound = right.abs() * 2**-8 + (x.double().abs() @ exact.abs().T) * (2**-9 if config.int8 else 2**-20) + 1e-6
        assert ((out - right).abs() <= bound).all()


@EACH
def test_the_same_bits(kernel: int, config: native.DenseConfiguration) -> None:
    """Every run, beside any other tokens of one reading, and in a CUDA graph whose input changes."""
    shape = LAYERS["qkv_proj"]
    _, given = layer(shape.rows, shape.columns, config.int8)
    x = tokens_of(config.tokens, shape.columns)
    whole = native.linear(x, *given, kernel)
    assert all(torch.equal(native.linear(x, *given, kernel), whole) for _ in range(20))
    if config.tokens <= 64:
        assert torch.equal(native.linear(x[:3], *given, kernel), whole[:3])
    static = torch.zeros_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = native.linear(static, *given, kernel)
        second = native.linear(static * 2, *given, kernel)
    static.copy_(x)
    for _ in range(20):
        first.zero_(), second.zero_()
        graph.replay()
        assert torch.equal(first, whole)
    assert torch.equal(second, native.linear(x * 2, *given, kernel))


@pytest.mark.parametrize("size", [(1, 32), (77, 2880), (5120, 2880)], ids=str)
def test_dequantized(size: tuple[int, int]) -> None:
    """The same bits as torch's."""
    weights = Int8Weights.quantize(layer(*size, int8=False)[0])
    out = native.dequantize(weights.codes, weights.scales)
    assert torch.equal(out, weights.decode(dtype=torch.bfloat16))
    torch.library.opcheck(torch.ops.mxfp4_sm120.dense_dequantize.default, (weights.codes, weights.scales))


@EACH
def test_opcheck(kernel: int, config: native.DenseConfiguration) -> None:
    _, (weight, bias, scale) = layer(200, 128, config.int8)
    op = torch.ops.mxfp4_sm120.dense_linear.default
    for count in (0, 3, 40):
        torch.library.opcheck(op, (tokens_of(count, 128), weight, scale, bias, kernel))


def test_another_stream_and_compiled() -> None:
    """The operator, with a kernel at up to 64 tokens, inside a compiled function of any number of tokens."""
    _, (codes, bias, scale) = layer(512, 256, True)
    operator.serve(LinearShape(512, 256, True), [[config.name for _, config in CONFIGS].index("int8_128x64")] * 65)
    compiled = torch.compile(lambda x: operator.linear(x, codes, scale, bias) + 1, fullgraph=True, dynamic=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for count in (3, 40, 64, 65, 300):
            x = tokens_of(count, 256)
            right = x.double() @ Int8Weights(codes, scale).decode(dtype=torch.float64).T + bias.double() + 1
            torch.testing.assert_close(compiled(x).double(), right, rtol=2e-2, atol=0.3)
    torch.cuda.synchronize()


@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
def test_the_card_decides(int8: bool, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """The proof's process finds every kernel right; none answers where torch was faster; the record is read again."""
    monkeypatch.setenv("MXFP4_SM120_CACHE_DIR", str(tmp_path))
    layers = plan.shapes(published_config("gpt-oss-20b"), 1, int8)
    made = plan.make(layers, Machine.here())
    assert made.reason is None
    for name, shape in layers.items():
        measured = [timing.tokens for timing in made.timings[shape]]
        assert measured == list(trial.TIMED)[: len(measured)] and measured[-1] == (256 if int8 else 128)
        print(f"{name} {shape} by {made.text(shape)}")
        for timing in made.timings[shape]:
            assert (made.name_at(shape, timing.tokens) is not None) == (timing.ours <= proof.MARGIN * timing.torchs)
    assert plan.make(layers, Machine.here()) == made


def test_encoding_takes_no_second_copy() -> None:
    """gpt-oss-20b's lm_head: its codes beside it and little more, so that loading stays within 600 MiB."""
    shape = LAYERS["lm_head"]
    weight = torch.empty(shape.rows, shape.columns, dtype=torch.bfloat16, device="cuda").normal_()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    encoded = Int8Weights.quantize(weight)
    assert encoded.relative_error(weight) <= TOLERANCE_OF_INT8
    more = torch.cuda.max_memory_allocated() - before
    print(f"{more / 2**20:.0f} MiB beside {weight.nbytes / 2**20:.0f}, codes {encoded.bytes / 2**20:.0f}")
    assert encoded.bytes < more <= 600 << 20
