# SPDX-License-Identifier: Apache-2.0
"""Which tiles serve the Triton backend best on this card: microseconds for a 20b layer, the present choice first.

python benchmarks/triton_tiles.py --tokens 1,16,256,4096
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from vllm_mxfp4_sm120.backends import triton as backend
from vllm_mxfp4_sm120.bench import timing
from vllm_mxfp4_sm120.bench.models import Inputs, model, random_weights

# block_m, block_n, block_k, warps, stages; by block_m of the choice that they compete with.
TRIED = {
    16: [(16, 64, 128, 4, 4), (16, 64, 256, 4, 3), (16, 32, 256, 4, 4), (16, 32, 128, 2, 5), (16, 128, 128, 4, 4),
         (16, 64, 64, 4, 6), (16, 128, 128, 8, 4), (16, 64, 128, 2, 4)],
    64: [(64, 128, 64, 4, 4), (64, 256, 64, 8, 4), (32, 128, 128, 4, 3), (64, 128, 128, 4, 3), (64, 128, 64, 8, 4),
         (32, 128, 64, 4, 4), (32, 64, 128, 4, 4), (64, 64, 128, 4, 4)],
    128: [(128, 256, 64, 8, 4), (128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4), (128, 128, 128, 8, 3),
          (128, 256, 128, 8, 3), (64, 256, 64, 8, 4), (256, 128, 64, 8, 3)],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,16,256,4096")
    sizes, device = model("20b"), torch.device("cuda")
    shape, layer = sizes.experts, backend.Triton(sizes.experts)
    layers = [layer.prepare(random_weights(shape, device, seed)) for seed in range(sizes.layers)]
    choose = backend.tiles_for
    for tokens in map(int, parser.parse_args().tokens.split(",")):
        inputs = Inputs.random(shape, tokens, sizes.layers, device)
        calls = [partial(layer.forward_logits, each, inputs.x, inputs.logits[i]) for i, each in enumerate(layers)]
        chosen = choose(tokens * shape.top_k, shape.num_experts)
        for tiles in [chosen, *(backend.Tiles(*tiles) for tiles in TRIED[chosen.block_m])]:
            backend.tiles_for = lambda *_, tiles=tiles: tiles
            try:
                walk = timing.walk_over(calls, capture=True)
                time = timing.medians({"": walk.run}, device, 20)[""] / walk.calls
                print(f"{tokens:6d} tokens {time:9.1f} us  {tiles}", flush=True)
            except RuntimeError as error:  # more shared memory or registers than the card has
                print(f"{tokens:6d} tokens {'-':>9}     {tiles}: {error}"[:120], flush=True)
    backend.tiles_for = choose


if __name__ == "__main__":
    main()
