# SPDX-License-Identifier: Apache-2.0
"""Every dense kernel beside torch's linear, at every number of tokens, of GPT-OSS's layers: microseconds.

    python benchmarks/dense_kernels.py --layers qkv_proj,lm_head --kinds int8 --tokens 1,2,4,8,16,32,64,128,256

First each kernel's answers are compared with float64, as in the proof's process (vllm_mxfp4_sm120/dense/trial.py),
which also times them this way: CUDA graphs over rotated weights, all in turn. Of INT8, torch's is decoding and
multiplying.
"""

from __future__ import annotations

import argparse

import torch

from vllm_mxfp4_sm120.backends.native import library
from vllm_mxfp4_sm120.checkpoint import published_config
from vllm_mxfp4_sm120.dense import plan, trial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt-oss-20b")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--layers", default="qkv_proj,o_proj,lm_head")
    parser.add_argument("--kinds", default="bf16,int8")
    parser.add_argument("--tokens", default=",".join(map(str, trial.TIMED)))
    given = parser.parse_args()
    library.load()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    for kind in given.kinds.split(","):
        shapes = plan.shapes(published_config(given.model), given.tensor_parallel, kind == "int8")
        for layer in given.layers.split(","):
            problem = trial.Problem.random(shapes[layer], "cuda")
            wrong = trial.what_is_wrong(problem)
            print(f"\n{layer} {shapes[layer]}: {wrong or 'every kernel is right'}", flush=True)
            names = [trial.TORCHS, *(config.name for _, config in trial.kernels(problem.shape))]
            print(f"{'tokens':>7}" + "".join(f"{name:>21}" for name in names))
            copies = problem.copies()
            for tokens in map(int, given.tokens.split(",")):
                times = trial.times_at(tokens, copies)
                print(
                    f"{tokens:7}" + "".join(f"{times[name]:21.2f}" if name in times else f"{'':21}" for name in names),
                    flush=True,
                )
            del problem, copies
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
