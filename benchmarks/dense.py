# SPDX-License-Identifier: Apache-2.0
"""GPT-OSS's linear layers (qkv, o, lm_head) on one GPU: this plugin's kernels beside cuBLAS and vLLM's, microseconds.

    python benchmarks/dense.py --layers qkv,o,lm_head --tokens 1,2,4,8,16,32,64,128,256

Each figure is the median of CUDA-graph replays that walk over several copies of the weights, so that the L2 cache never
holds the next call's; all take turns. "limit" is what reading the weights takes at the bandwidth that a sum over a
large tensor reaches on this card in the same run, for BF16 and for INT8 with a scale per 32. What can't be imported or
refuses a call has an empty place. Errors are against float64 on the weights before quantization.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from layer import median_microseconds
from torch import Tensor

from vllm_mxfp4_sm120.backends.native import library
from vllm_mxfp4_sm120.dense import native
from vllm_mxfp4_sm120.dense.int8 import Int8Weights

DEVICE = "cuda"
# Rows, K, and copies of the weights to walk over.
LAYERS = {"qkv": (5120, 2880, 24), "o": (2880, 4096, 24), "lm_head": (201088, 2880, 2)}
TOKENS = "1,2,4,8,16,32,64,128,256,512,1024,2048"

Linear = Callable[[Tensor], Tensor]  # x bf16 [M, K] -> [M, N]


def cublas(weight: Tensor) -> Linear:
    return lambda x: torch.nn.functional.linear(x, weight)


def ours_bf16(weight: Tensor) -> Linear:
    return lambda x: native.linear(x, weight)


def ours_int8(weight: Tensor) -> Linear:
    encoded = Int8Weights.quantize(weight)
    return lambda x: native.linear(x, encoded.codes, scale=encoded.scales)


def marlin(kind: str) -> Callable[[Tensor], Linear]:
    """vLLM's Marlin, on weights and scales of the right sizes but any values: for its time only."""

    def make(weight: Tensor) -> Linear:
        from vllm import _custom_ops as ops
        from vllm.scalar_type import scalar_types

        rows, k = weight.shape
        type_ = scalar_types.uint8b128 if kind == "int8" else scalar_types.float8_e4m3fn
        packed = torch.randint(0, 2**31 - 1, (k // 16, rows * 4), dtype=torch.int32, device=DEVICE)
        scale = torch.rand(k // 32 if kind == "int8" else 1, rows, device=DEVICE).bfloat16() * 0.01
        workspace = torch.zeros(
            torch.cuda.get_device_properties(0).multi_processor_count * 64, dtype=torch.int32, device=DEVICE
        )
        return lambda x: ops.marlin_gemm(
            x, None, packed, None, scale, None, None, None, workspace, type_, x.shape[0], rows, k,
            use_atomic_add=False, use_fp32_reduce=True,
        )  # fmt: skip

    return make


def cutlass_fp8(weight: Tensor) -> Linear:
    """vLLM's CUTLASS W8A8, a scale a row and a token: the quantization of x is part of its time."""
    from vllm import _custom_ops as ops

    scale = weight.abs().amax(1, keepdim=True).float() / 448
    codes, scales = (weight.float() / scale).to(torch.float8_e4m3fn).t(), scale.t().contiguous()

    def linear(x: Tensor) -> Tensor:
        x8, x_scale = ops.scaled_fp8_quant(x, use_per_token_if_dynamic=True)
        return ops.cutlass_scaled_mm(x8, codes, x_scale, scales, torch.bfloat16)

    return linear


KINDS: dict[str, Callable[[Tensor], Linear]] = {
    "cublas bf16": cublas,
    "ours bf16": ours_bf16,
    "ours int8": ours_int8,
    "marlin int8 g32": marlin("int8"),
    "marlin fp8": marlin("fp8"),
    "cutlass fp8": cutlass_fp8,
}


def read_bandwidth() -> float:
    """Bytes per microsecond."""
    data = torch.ones(1 << 28, dtype=torch.int32, device=DEVICE)
    return data.nbytes / median_microseconds({"sum": lambda: data.sum()}, 10)["sum"]


def graph_of(linears: list[Linear], x: Tensor) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for linear in linears:
            linear(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for linear in linears:
            linear(x)
    return graph


def made(weights: list[Tensor]) -> dict[str, list[Linear]]:
    """Each kind for all copies of the weights; what isn't installed is left out, and said."""
    found: dict[str, list[Linear]] = {}
    for name, make in KINDS.items():
        try:
            found[name] = [make(weight) for weight in weights]
        except (ImportError, AttributeError) as error:
            print(f"{name}: left out, {error}")
    return found


def measure(linears: dict[str, list[Linear]], x: Tensor) -> dict[str, float]:
    """Microseconds of one call; without those that refuse it."""
    graphs = {}
    for name, copies in linears.items():
        try:
            graphs[name] = graph_of(copies, x)
        except (RuntimeError, ValueError, TypeError) as error:
            print(f"{name}, {x.shape[0]} tokens: {str(error).splitlines()[0][:100]}")
            torch.cuda.synchronize()
    times = median_microseconds({name: graph.replay for name, graph in graphs.items()}, 15)
    return {name: time / len(linears[name]) for name, time in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--tokens", default=TOKENS)
    given = parser.parse_args()
    library.load()
    rate = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, reads {rate / 1e6:.2f} TB/s")
    for layer in given.layers.split(","):
        rows, k, copies = LAYERS[layer]
        weights = [torch.randn(rows, k, device=DEVICE).bfloat16() for _ in range(copies)]
        linears = made(weights)
        limits = f"limit {rows * k * 2 / rate:.1f} bf16, {rows * k * 17 / 16 / rate:.1f} int8"
        print(f"\n{layer} {rows} x {k}, us, {limits}\n{'tokens':>7}" + "".join(f"{name:>17}" for name in linears))
        for tokens in map(int, given.tokens.split(",")):
            times = measure(linears, torch.randn(tokens, k, device=DEVICE).bfloat16())
            cells = (f"{times[name]:17.1f}" if name in times else " " * 17 for name in linears)
            print(f"{tokens:7}" + "".join(cells), flush=True)
        x, sample = torch.randn(8, k, device=DEVICE).bfloat16(), weights[0][:5120]
        expected = x.double() @ sample.double().T
        for name in ("cublas bf16", "ours bf16", "ours int8"):
            out = linears[name][0](x)[:, :5120].double()
            print(f"{name}: error {float((out - expected).norm() / expected.norm()):.2e}")
        del weights, linears
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
