# SPDX-License-Identifier: Apache-2.0
"""Host time of one MoE layer outside CUDA graphs, without any kernel: the stub's, on one thread.

    kernels/build.sh --stub -o stub.so && MXFP4_SM120_ALLOW_STUB_KERNEL=1 python benchmarks/host_time.py stub.so

What it prints is what `Native.forward_logits` costs, and the op alone: checks, rule, output, workspace.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from vllm_mxfp4_sm120.backends.native import Native, library
from vllm_mxfp4_sm120.moe import MoEShape, MoEWeights

CALLS, ROUNDS = 20_000, 7


def microseconds(call: Callable[[], object]) -> float:
    """The fastest round's mean."""
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - begin) / CALLS * 1e6)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stub", type=Path)
    library.LIBRARY = parser.parse_args().stub.resolve()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    layer = Native(MoEShape(4, 4, 64, 32, 2))
    prepared = layer.prepare(MoEWeights.empty(layer.shape, "cpu"))
    x, logits = torch.ones(1, 64, dtype=torch.bfloat16), torch.zeros(1, 4)
    with torch.inference_mode():
        whole = microseconds(lambda: layer.forward_logits(prepared, x, logits))
        op, arguments = torch.ops.mxfp4_sm120.moe_layer.default, (x, prepared["w13"], prepared["w2"])
        biases = prepared["w13_bias"], prepared["w2_bias"]
        alone = microseconds(lambda: op(*arguments, *biases, logits, None, None, None, 4, 2, True, -1))
        alloc = microseconds(lambda: torch.empty_like(x))
    print(f"torch {torch.__version__}, us: forward_logits {whole:.2f}, the op {alone:.2f}, empty_like {alloc:.2f}")


if __name__ == "__main__":
    main()
