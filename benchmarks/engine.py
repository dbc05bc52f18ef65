"""The whole engine: vLLM with this plugin beside vLLM with its own MXFP4 experts, one process for each, one table.

    mxfp4-sm120 make-tiny --like openai/gpt-oss-20b /data/g20
    python benchmarks/engine.py /data/g20 --choices ours,marlin,triton,auto --json engine.json

"ours" is `--quantization mxfp4_sm120`; any other name is vLLM's own `--quantization mxfp4` with that `--moe-backend`.
Every length is served twice and the second time counts. Prompts are random tokens; answers ignore the end of text.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# vLLM's own words at the end of loading: GiB that the weights take, and seconds.
LOADED = re.compile(r"Model loading took ([\d.]+) GiB memory and ([\d.]+) seconds")
PROMPT_TOKENS, ANSWER_TOKENS = 128, 256


def measure(task: dict[str, Any]) -> dict[str, float]:
    """One engine's figures, in this process."""
    from vllm import LLM, SamplingParams

    begun = time.perf_counter()
    llm = LLM(**task["engine"])
    figures = {"start s": time.perf_counter() - begun}
    config = llm.llm_engine.vllm_config
    figures["KV tokens"] = float((config.cache_config.num_gpu_blocks or 0) * config.cache_config.block_size)
    vocabulary = config.model_config.get_vocab_size()

    def seconds(prompts: int, prompt_tokens: int, answer_tokens: int) -> float:
        sampling = SamplingParams(temperature=0.0, max_tokens=answer_tokens, ignore_eos=True, detokenize=False)
        for _ in range(2):  # new prompts each time: the prefix cache must not help
            ids = [[random.randrange(vocabulary) for _ in range(prompt_tokens)] for _ in range(prompts)]
            begun = time.perf_counter()
            llm.generate([{"prompt_token_ids": i} for i in ids], sampling, use_tqdm=False)
        return time.perf_counter() - begun

    for concurrent in task["concurrent"]:
        took = seconds(concurrent, PROMPT_TOKENS, task["answer_tokens"])
        figures[f"tok/s at {concurrent}"] = concurrent * task["answer_tokens"] / took
    figures["first token ms"] = seconds(1, task["long"], 1) * 1e3
    figures["prefill tok/s"] = 8 * task["long"] / seconds(8, task["long"], 1)
    return figures


def in_a_process(task: dict[str, Any], log: Path) -> dict[str, float]:
    """The same in a process of its own, whose words go to `log`. Raises CalledProcessError if it fails."""
    result = log.with_suffix(".json")
    with log.open("w") as words:
        command = [sys.executable, __file__, "--measure", json.dumps(task), str(result)]
        subprocess.run(command, stdout=words, stderr=subprocess.STDOUT, check=True)
    figures = json.loads(result.read_text())
    if loaded := LOADED.search(log.read_text()):
        figures["weights GiB"], figures["load s"] = map(float, loaded.groups())
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--choices", default="ours,marlin,triton,auto")
    parser.add_argument("--concurrent", default="1,8,64,256")
    parser.add_argument("--answer-tokens", type=int, default=ANSWER_TOKENS)
    parser.add_argument("--long", type=int, default=4096, help="tokens of the long prompts")
    parser.add_argument("--engine", type=json.loads, default={}, help="more arguments of vllm.LLM, as JSON")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()

    from rich.console import Console
    from rich.table import Table

    console = Console()
    concurrent = [int(n) for n in given.concurrent.split(",")]
    results: dict[str, dict[str, float]] = {}
    logs = Path(tempfile.mkdtemp(prefix="engine-"))
    for choice in given.choices.split(","):
        which = (
            {"quantization": "mxfp4_sm120"} if choice == "ours" else {"quantization": "mxfp4", "moe_backend": choice}
        )
        room = {"max_model_len": 2 * given.long, "max_num_seqs": max(concurrent)}
        engine = {"model": given.model, "skip_tokenizer_init": True, **room, **which, **given.engine}
        task = {"engine": engine, "concurrent": concurrent, "answer_tokens": given.answer_tokens, "long": given.long}
        with console.status(f"{choice}: starting vLLM and measuring; log in {logs / choice}.log"):
            try:
                results[choice] = in_a_process(task, logs / f"{choice}.log")
            except subprocess.CalledProcessError as error:
                console.print(f"{choice}: not measured, exit status {error.returncode}, see {logs / choice}.log")

    table = Table("", *results)
    for name in dict.fromkeys(name for figures in results.values() for name in figures):
        row = (figures.get(name) for figures in results.values())
        table.add_row(name, *("-" if value is None else f"{value:,.1f}" for value in row))
    console.print(table)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(not results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        Path(sys.argv[3]).write_text(json.dumps(measure(json.loads(sys.argv[2]))))
    else:
        main()
