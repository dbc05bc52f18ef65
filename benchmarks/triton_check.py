"""Check the Triton backend against the float64 reference on a GPU, and time the gpt-oss-20b layer.

    python benchmarks/triton_check.py [--tokens 1,16,256,4096] [--sweep] [--skip-check]

Needs torch and triton only. Microseconds per layer, routing included: the median of CUDA-graph replays that walk over
several layers' weights, so that the L2 cache never holds the next layer's. `--sweep` times other tiles as well.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vllm_mxfp4_sm120.backends import triton as backend
from vllm_mxfp4_sm120.moe import Activation, MoEShape, MoEWeights, reference, topk_softmax
from vllm_mxfp4_sm120.proof import random_inputs, random_weights

GPT_OSS_20B = MoEShape(32, 32, 2880, 2880, 4)
LAYERS = 3  # 1.3 GB of weights: many times any L2
REPLAYS = 15

CHECKED = {
    "20b": GPT_OSS_20B,
    "120b, 1 of 4 ranks of experts": MoEShape(128, 32, 2880, 2880, 4),
    "20b, tensor parallel 4": MoEShape(32, 32, 2880, 736, 4),
    "odd blocks, no bias, SiLU": MoEShape(8, 8, 96, 160, 2, False, Activation.SILU),
}

# Tiles worth comparing: block_m, block_n, block_k, warps, stages.
SWEEP = {
    16: [(16, 64, 128, 4, 4), (16, 64, 256, 4, 3), (16, 32, 256, 4, 4), (16, 32, 128, 2, 5), (16, 128, 128, 4, 4),
         (16, 64, 64, 4, 6), (16, 128, 128, 8, 4), (16, 64, 128, 2, 4)],
    64: [(64, 128, 64, 4, 4), (64, 256, 64, 8, 4), (32, 128, 128, 4, 3), (64, 128, 128, 4, 3), (64, 128, 64, 8, 4),
         (32, 128, 64, 4, 4), (32, 64, 128, 4, 4), (64, 64, 128, 4, 4)],
    128: [(128, 256, 64, 8, 4), (128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4), (128, 128, 128, 8, 3),
          (128, 256, 128, 8, 3), (64, 256, 64, 8, 4), (256, 128, 64, 8, 3)],
}  # fmt: skip


def check() -> bool:
    good = True
    for title, shape in CHECKED.items():
        layer, prepared = prepared_layer(shape, seed=0)
        weights = random_weights(shape, "cuda", seed=0)
        expert_map = None
        if shape.local_experts < shape.num_experts:
            expert_map = torch.full((shape.num_experts,), -1, dtype=torch.int32, device="cuda")
            expert_map[1 :: shape.num_experts // shape.local_experts] = torch.arange(
                shape.local_experts, dtype=torch.int32, device="cuda"
            )
        for tokens in (1, 2, 16, 60, 256, 1000, 5000):
            x, logits = random_inputs(shape, tokens, "cuda")
            topk_ids, topk_weights = topk_softmax(logits, shape.top_k)
            expected = reference(weights, x, topk_ids, topk_weights, shape.activation, expert_map)
            answer = layer.forward_logits(prepared, x, logits, expert_map)
            routed = layer.forward(prepared, x, topk_ids, topk_weights, expert_map)
            error = ((answer.double() - expected).norm() / expected.norm()).item()
            routed_error = ((routed.double() - expected).norm() / expected.norm()).item()
            same = torch.equal(answer, layer.forward_logits(prepared, x, logits, expert_map))
            ok = max(error, routed_error) < 5e-3 and same
            good &= ok
            print(
                f"{'ok ' if ok else 'BAD'} {title:32} {tokens:5} tokens  error {error:.2e} {routed_error:.2e}  "
                f"{'same bits' if same else 'DIFFERENT BITS'}",
                flush=True,
            )
    return good


def prepared_layer(shape: MoEShape, seed: int) -> tuple[backend.Triton, dict[str, torch.Tensor]]:
    layer = backend.Triton(shape)
    return layer, layer.prepare(random_weights(shape, "cuda", seed))


def time_layer(layers: list, tokens: int) -> float:
    """Median microseconds per layer."""
    x = torch.randn(tokens, GPT_OSS_20B.hidden_size, device="cuda").bfloat16()
    logits = torch.randn(tokens, GPT_OSS_20B.num_experts, device="cuda").bfloat16()

    def walk() -> None:
        for layer, prepared in layers:
            layer.forward_logits(prepared, x, logits)

    walk()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        walk()
    times = []
    for _ in range(REPLAYS + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(layers))
    return sorted(times[3:])[REPLAYS // 2]


def cheap_layers() -> list:
    """Layers of random bits made on the GPU: quick to make, and as good for timing."""
    layers = []
    for _ in range(LAYERS):
        weights = MoEWeights.empty(GPT_OSS_20B, "cuda")
        for codes in (weights.w13, weights.w2):
            codes.copy_(torch.randint(0, 256, codes.shape, dtype=torch.uint8, device="cuda"))
        for scales in (weights.w13_scale, weights.w2_scale):
            scales.fill_(119)
        layer = backend.Triton(GPT_OSS_20B)
        layers.append((layer, layer.prepare(weights)))
    return layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,16,64,256,1024,4096")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--skip-check", action="store_true")
    given = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", backend.triton.__version__)
    good = given.skip_check or check()
    layers = cheap_layers()
    chosen_tiles = backend.tiles_for
    for tokens in map(int, given.tokens.split(",")):
        chosen = chosen_tiles(tokens * 4, 32, backend._shared_memory(torch.device("cuda")))
        print(f"{tokens:5} tokens {time_layer(layers, tokens):8.1f} us  {chosen}", flush=True)
        if not given.sweep:
            continue
        for tiles in SWEEP[16 if chosen.block_m == 16 else 64 if chosen.block_m < 128 else 128]:
            backend.tiles_for = lambda *_, tiles=tiles: backend.Tiles(*tiles)
            try:
                print(f"{'':12} {time_layer(layers, tokens):8.1f} us  {tiles}", flush=True)
            except Exception as error:
                print(f"{'':12} {type(error).__name__} {str(error)[:80]}  {tiles}", flush=True)
        backend.tiles_for = chosen_tiles
    sys.exit(not good)


if __name__ == "__main__":
    main()
