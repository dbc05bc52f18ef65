# SPDX-License-Identifier: Apache-2.0
"""One GPT-OSS MoE layer on one GPU: this plugin's backends beside vLLM's, microseconds a layer, in one run.

    python benchmarks/layer.py --model 20b --tokens 1,8,64,512,4096 --backends native,triton,vllm-marlin,vllm-triton

Each figure is the median of CUDA-graph replays that walk over several layers' weights, so that the L2 cache never holds
the next call's; the backends take turns; routing, both GEMMs, activation and combination included. "limit" is what a
streaming read of the bytes that the layer touches takes at this card's measured read bandwidth, or its operations at
the measured rate of a BF16 matrix product, whichever is longer (mma.sync kernels reach about three quarters of that
rate on Hopper, whose faster wgmma SM120 lacks). The error is against float64, with the activation between the GEMMs
rounded to BF16 as every backend rounds it. With `--skew`, half of all (token, choice) pairs fall on 2 experts.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vllm_mxfp4_sm120.backends.base import Backend
from vllm_mxfp4_sm120.backends.native import Native
from vllm_mxfp4_sm120.backends.triton import Triton
from vllm_mxfp4_sm120.checkpoint import Sizes, published_config
from vllm_mxfp4_sm120.moe import MoEShape, MoEWeights, reference, topk_softmax
from vllm_mxfp4_sm120.platform import Machine

# Layers' weights to walk over: together far larger than any L2 cache.
LAYERS = {"20b": 4, "120b": 2}
MODELS = {name: (Sizes.from_config(published_config(f"gpt-oss-{name}")).layer, n) for name, n in LAYERS.items()}
TOKENS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192"
DEVICE = "cuda"

Layer = Callable[[Tensor, Tensor], Tensor]  # (x [M, H], router logits [M, E]) -> [M, H]


def random_weights(shape: MoEShape, seed: int) -> MoEWeights:
    """Random codes and scales 2^-9..2^-6, drawn on the GPU: there are gigabytes of them."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    weights = MoEWeights.empty(shape, DEVICE)
    for codes, scales in ((weights.w13, weights.w13_scale), (weights.w2, weights.w2_scale)):
        codes.random_(0, 256, generator=generator)
        scales.random_(118, 122, generator=generator)
    for bias in (weights.w13_bias, weights.w2_bias):
        if bias is not None:
            bias.normal_(std=0.1, generator=generator)
    return weights


def ours(backend: type[Backend]) -> Callable[[MoEShape, MoEWeights], Layer]:
    def make(shape: MoEShape, weights: MoEWeights) -> Layer:
        if why_not := backend.why_not(Machine.here(), shape):
            raise ImportError(why_not)
        layer = backend(shape)
        prepared = layer.prepare(weights)
        return lambda x, logits: layer.forward_logits(prepared, x, logits)

    return make


def vllm_marlin(shape: MoEShape, weights: MoEWeights) -> Layer:
    """vLLM's Marlin experts, padded to 3072 x 2944 as vLLM pads GPT-OSS for them."""
    from types import SimpleNamespace

    from vllm.model_executor.layers.fused_moe.activation import ApplyMoEActivationConfig, MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk
    from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import prepare_moe_mxfp4_layer_for_marlin
    from vllm.scalar_type import scalar_types

    assert weights.w13_bias is not None and weights.w2_bias is not None
    experts, hidden, intermediate = shape.num_experts, 3072, 2944

    def padded(tensor: Tensor, *sizes: int) -> Tensor:
        out = torch.zeros(experts, *sizes, dtype=tensor.dtype, device=DEVICE)
        out[tuple(slice(0, size) for size in tensor.shape)] = tensor
        return out

    w13, w2, w13_scale, w2_scale, w13_bias, w2_bias = prepare_moe_mxfp4_layer_for_marlin(
        SimpleNamespace(params_dtype=torch.bfloat16),
        padded(weights.w13, 2 * intermediate, hidden // 2),
        padded(weights.w2, hidden, intermediate // 2),
        padded(weights.w13_scale, 2 * intermediate, hidden // 32),
        padded(weights.w2_scale, hidden, intermediate // 32),
        padded(weights.w13_bias, 2 * intermediate),
        padded(weights.w2_bias, hidden),
    )
    activation = ApplyMoEActivationConfig(clamp_limit=7.0, alpha=1.702, beta=1.0)

    def layer(x: Tensor, logits: Tensor) -> Tensor:
        wide = torch.nn.functional.pad(x, (0, hidden - shape.hidden_size))
        gates, ids, *_ = fused_topk(wide, logits, shape.top_k, True)
        out = fused_marlin_moe(
            wide, w13, w2, w13_bias, w2_bias, w13_scale, w2_scale, gates, ids,
            quant_type_id=scalar_types.float4_e2m1f.id, global_num_experts=experts,
            activation=MoEActivation.SWIGLUOAI, activation_config=activation, moe_sum=None,
        )  # fmt: skip
        return out[:, : shape.hidden_size]

    return layer


def vllm_triton(shape: MoEShape, weights: MoEWeights) -> Layer:
    """vLLM's Triton experts (OpenAI's triton_kernels), what it takes by itself on Hopper."""
    from triton_kernels.matmul_ogs import FlexCtx, PrecisionConfig
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import mxfp4_w4a16_moe_quant_config
    from vllm.model_executor.layers.fused_moe.experts.gpt_oss_triton_kernels_moe import triton_kernel_moe_forward
    from vllm.model_executor.layers.quantization.utils.mxfp4_utils import _swizzle_mxfp4, mx_scale_kwargs
    from vllm.utils.import_utils import has_triton_kernels

    if not has_triton_kernels():
        raise ImportError("triton_kernels is missing")

    def swizzled(codes: Tensor, scales: Tensor) -> tuple:
        matrix, flex, scale = _swizzle_mxfp4(codes.contiguous(), scales.contiguous())
        return matrix, PrecisionConfig(**mx_scale_kwargs(scale), flex_ctx=FlexCtx(rhs_data=flex))

    assert weights.w13_bias is not None and weights.w2_bias is not None
    w13, w13_precision = swizzled(weights.w13, weights.w13_scale)
    w2, w2_precision = swizzled(weights.w2, weights.w2_scale)
    config = mxfp4_w4a16_moe_quant_config(
        w1_scale=w13_precision, w2_scale=w2_precision,
        w1_bias=weights.w13_bias.float(), w2_bias=weights.w2_bias.float(),
        gemm1_alpha=1.702, gemm1_beta=1.0, gemm1_clamp_limit=7.0,
    )  # fmt: skip
    return lambda x, logits: triton_kernel_moe_forward(
        x, w13, w2, logits, shape.top_k, True,
        activation=MoEActivation.SWIGLUOAI, quant_config=config, global_num_experts=shape.num_experts,
    )  # fmt: skip


BACKENDS = {"native": ours(Native), "triton": ours(Triton), "vllm-marlin": vllm_marlin, "vllm-triton": vllm_triton}


def graph_of(layers: list[Layer], x: Tensor, all_logits: list[Tensor], walks: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph that walks over all layers, so many times."""

    def walk() -> None:
        for _ in range(walks):
            for layer, logits in zip(layers, all_logits, strict=True):
                layer(x, logits)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        walk()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        walk()
    return graph


def median_microseconds(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Of each call; they take turns, for a card's clock changes with its power and warmth."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 3):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if repeat >= 3:
                times[name].append(start.elapsed_time(end) * 1e3)
    return {name: statistics.median(each) for name, each in times.items()}


def microseconds(backends: dict[str, list[Layer]], x: Tensor, all_logits: list[Tensor]) -> dict[str, float]:
    """One layer's time with each backend."""
    # As many calls in a graph as a model has, where it matters that a graph's own launch takes 4 us.
    walks = 24 // len(all_logits) if x.shape[0] <= 64 else 1
    replays = {name: graph_of(layers, x, all_logits, walks).replay for name, layers in backends.items()}
    return {name: time / walks / len(all_logits) for name, time in median_microseconds(replays, 20).items()}


def card_rates() -> tuple[float, float]:
    """This card's (bytes read and written, BF16 operations) per microsecond, measured."""
    data = torch.randint(-9, 9, (1 << 28,), dtype=torch.int32, device=DEVICE)
    copy = torch.empty_like(data)
    a, b = (torch.randn(8192, 8192, device=DEVICE).bfloat16() for _ in range(2))
    times = median_microseconds({"copy": lambda: copy.copy_(data), "multiply": lambda: a @ b}, 10)
    return 2 * data.nbytes / times["copy"], 2 * 8192**3 / times["multiply"]


def router_logits(shape: MoEShape, tokens: int, skew: bool) -> Tensor:
    logits = torch.randn(tokens, shape.num_experts, device=DEVICE)
    if skew:  # two of each token's four choices
        logits[:, :2] += 100.0
    return logits.bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="20b")
    parser.add_argument("--tokens", default=TOKENS)
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--tp", type=int, default=1, help="the shard of one of so many ranks")
    parser.add_argument("--skew", action="store_true", help="half of all choices fall on 2 experts")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    shape, layers = MODELS[arguments.model]
    shape = replace(shape, intermediate_size=shape.intermediate_size // arguments.tp)
    tokens_list = [int(tokens) for tokens in arguments.tokens.split(",")]
    read, multiply = card_rates()
    card = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(f"{card}: {read / 1e6:.2f} TB/s copied, {multiply / 1e6:.0f} TFLOP/s")

    torch.manual_seed(0)
    problems = {
        tokens: (
            torch.randn(tokens, shape.hidden_size, device=DEVICE).bfloat16(),
            [router_logits(shape, tokens, arguments.skew) for _ in range(layers)],
        )
        for tokens in tokens_list
    }
    backends: dict[str, list[Layer]] = {}
    for name in arguments.backends.split(","):
        try:
            backends[name] = [BACKENDS[name](shape, random_weights(shape, seed)) for seed in range(layers)]
        except ImportError as missing:
            print(f"{name}: not measured, {missing}")
            continue
        x, logits = problems[tokens_list[0]][0][:16], problems[tokens_list[0]][1][0][:16]
        exact = reference(
            random_weights(shape, 0), x, *topk_softmax(logits, shape.top_k), activation_dtype=torch.bfloat16
        )
        error = (backends[name][0](x, logits).double() - exact).norm() / exact.norm()
        print(f"{name}: relative error {error:.2e}")

    results: dict[str, dict[int, float]] = {"limit": {}} | {name: {} for name in backends}
    print(f"\n{'tokens':>7} {'limit':>9}" + "".join(f"{name:>13}" for name in backends))
    for tokens, (x, all_logits) in problems.items():
        active = statistics.mean(len(topk_softmax(logits, shape.top_k)[0].unique()) for logits in all_logits)
        operations = 6 * tokens * shape.top_k * shape.hidden_size * shape.intermediate_size
        results["limit"][tokens] = max(active * shape.packed_bytes_per_expert / read, operations / multiply)
        for name, time in microseconds(backends, x, all_logits).items():
            results[name][tokens] = time
        row = "".join(f"{results[name][tokens]:13.1f}" for name in backends)
        print(f"{tokens:7d} {results['limit'][tokens]:9.1f}{row}", flush=True)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"model": arguments.model, "tp": arguments.tp, "microseconds": results}, indent=1)
        )


if __name__ == "__main__":
    main()
