# SPDX-License-Identifier: Apache-2.0
"""Other models' answers, in one process: python -m tests.engine.neighbours RESULT FOLDER... [--without SYMBOL]

SYMBOL is module:name of vLLM's, taken away before the plugins are loaded. The result: {folder: [[token, logprob]]}.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
from pathlib import Path


def clean_up() -> None:
    """After an engine, so that the next one finds neither its groups of ranks nor its memory."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def main() -> None:
    result, *folders = sys.argv[1:]
    if "--without" in folders:
        symbol = folders.pop()
        folders.remove("--without")
        module, _, name = symbol.partition(":")
        delattr(importlib.import_module(module), name)
    from vllm import LLM, SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0)
    prompts = [{"prompt_token_ids": list(range(3, 3 + length))} for length in (1, 5, 40)]
    answers = {}
    for folder in folders:
        llm = LLM(
            model=folder,
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=128,
            kv_cache_memory_bytes=1 << 25,
            dtype="bfloat16",
        )
        outputs = [request.outputs[0] for request in llm.generate(prompts, sampling, use_tqdm=False)]
        answers[Path(folder).name] = [
            [(token, step[token].logprob) for token, step in zip(output.token_ids, output.logprobs, strict=True)]
            for output in outputs
        ]
        del llm
        clean_up()
    Path(result).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
