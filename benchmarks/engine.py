# SPDX-License-Identifier: Apache-2.0
"""The whole engine: vLLM with this plugin beside vLLM with its own MXFP4 experts, one process for each, one table.

    mxfp4-sm120 make-tiny --like openai/gpt-oss-20b /data/g20
    python benchmarks/engine.py /data/g20 --choices ours,marlin,triton,auto --json engine.json
    python benchmarks/engine.py /data/g20 --choices ours,marlin --profile 1,8,64

"ours" is `--quantization mxfp4_sm120`, "ours:NAME" that with a backend by name, "bf16" the same model unquantized with
made-up weights (compare it with what has such weights too, by --engine below); any other name is vLLM's own
`--quantization mxfp4` with that `--moe-backend`. "-tp2", "-ep2" or "-pp2" after a name means two GPUs, tensor, expert
or pipeline parallel. A directory with nothing but config.json will do, with --engine
'{"load_format": "dummy"}'. Prompts are random tokens, answers ignore the end of text, and everything is served until
it gets no faster and compiles nothing. Every choice also answers the same prompts greedily, and is compared in that
with the first choice.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vllm_mxfp4_sm120.cli.serve import first_error

# vLLM's own words: GiB that the weights take, and seconds; tokens for which the KV cache has room; kernels that were
# compiled after its start.
LOADED = re.compile(r"Model loading took ([\d.]+) GiB memory and ([\d.]+) seconds")
KV_CACHE = re.compile(r"KV cache size: ([\d,]+) tokens")
COMPILED = re.compile(r"ompilation during inference: (\S+?)[. ]")
PROMPT_TOKENS, ANSWER_TOKENS = 128, 256
# What is served again takes as long as before, give or take this, and compiles nothing: then it was measured.
SETTLED, MOST_ROUNDS = 0.97, 9
# Decode steps that --profile looks at: what a long answer takes longer than a short one.
SHORT, LONG = 8, 72
# Answers are compared token by token. Two tokens are tied if both engines list both, and agree on their
# log-probabilities within this much.
COMPARED_PROMPTS, COMPARED_TOKENS, LISTED, TIE = 16, 64, 5, 2e-2

# Whose a kernel is, by its name; the first that matches.
GROUPS = {
    "MoE": r"mxfp4_sm120|moe|marlin|matmul_ogs|topk|expert|_gate_up|_down|_combine|_place|_route|_count",
    "attention": r"attention|attn|flash|fmha|reduce_segments|cache|rotary",
    "GEMM": r"gemm|gemv|nvjet|cutlass|cublas|splitk|xmma",
    "norm": r"norm|rsqrt",
    "other": "",
}

Figures = dict[str, float]
# A greedy answer: for each step the likeliest tokens, the chosen one first, and their log-probabilities.
Answer = list[dict[str, float]]


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One engine's "figures", its "answers", and the "profile" of a decode step for each number of requests:

    {"us": microseconds, "kernels": {name: [calls, microseconds]}}.
    """
    from vllm import LLM, SamplingParams

    begun = time.perf_counter()
    llm = LLM(**task["engine"], worker_extension_cls="engine_worker.Watch")
    figures = {"start s": time.perf_counter() - begun}
    for worker in llm.collective_rpc("gpu_memory"):
        figures |= {name: max(value, figures.get(name, 0.0)) for name, value in worker.items()}
    vocabulary = llm.llm_engine.model_config.get_vocab_size()

    def prompts(count: int, tokens: int, seed: int | None = None) -> list[dict[str, list[int]]]:
        generator = random.Random(seed)
        return [{"prompt_token_ids": [generator.randrange(vocabulary) for _ in range(tokens)]} for _ in range(count)]

    def sampling(tokens: int, **more: int) -> SamplingParams:
        return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, **more)

    def serve(count: int, prompt_tokens: int, answer_tokens: int) -> float:
        inputs = prompts(count, prompt_tokens)  # new ones each time: the prefix cache must not help
        begun = time.perf_counter()
        llm.generate(inputs, sampling(answer_tokens), use_tqdm=False)
        return time.perf_counter() - begun

    def seconds(*load: int) -> float:
        best = float("inf")
        for _ in range(MOST_ROUNDS):
            compiled_before, best_before = compiled(task["log"]), best
            took = serve(*load)
            best = min(best, took)
            if took > SETTLED * best_before and compiled(task["log"]) == compiled_before:
                break
        return best

    def decode_step(count: int) -> dict[str, Any]:
        def kernels(tokens: int) -> dict[str, tuple[int, float]]:
            llm.collective_rpc("start_recording")
            serve(count, PROMPT_TOKENS, tokens)
            return llm.collective_rpc("stop_recording")[0]

        took = seconds(count, PROMPT_TOKENS, LONG) - seconds(count, PROMPT_TOKENS, SHORT)
        short, long = kernels(SHORT), kernels(LONG)
        return {"us": took / (LONG - SHORT) * 1e6, "kernels": per_step(short, long)}

    for concurrent in task["concurrent"]:
        took = seconds(concurrent, PROMPT_TOKENS, task["answer_tokens"])
        figures[f"tok/s at {concurrent}"] = concurrent * task["answer_tokens"] / took
    figures["first token ms"] = seconds(1, task["long"], 1) * 1e3
    figures["prefill tok/s"] = 8 * task["long"] / seconds(8, task["long"], 1)
    compared = prompts(COMPARED_PROMPTS, PROMPT_TOKENS, seed=0)
    answers = [
        chosen_first(request.outputs[0])
        for request in llm.generate(compared, sampling(COMPARED_TOKENS, logprobs=LISTED), use_tqdm=False)
    ]
    profile = {str(concurrent): decode_step(concurrent) for concurrent in task["profile"]}
    return {"figures": figures, "answers": answers, "profile": profile}


def compiled(log: str) -> int:
    """How often something was compiled up to now, as the log says."""
    return len(COMPILED.findall(Path(log).read_text()))


def per_step(short: dict[str, tuple[int, float]], long: dict[str, tuple[int, float]]) -> dict[str, list[float]]:
    """Each kernel's calls and microseconds in one of the steps that the longer answers have more."""
    none, steps = (0, 0.0), LONG - SHORT
    each = {name: [(a - b) / steps for a, b in zip(long[name], short.get(name, none), strict=True)] for name in long}
    return {name: cost for name, cost in each.items() if cost[1] > 0}


def chosen_first(output: Any) -> list[dict[str, float]]:
    """Log-probabilities of each step by token, that of the chosen one first."""
    steps = zip(output.token_ids, output.logprobs, strict=True)
    return [{str(token): step[token].logprob for token in (chosen, *step)} for chosen, step in steps]


def engine_arguments(choice: str) -> dict[str, Any]:
    """vLLM's arguments for one of --choices. Raises ValueError for what isn't one."""
    parsed = re.fullmatch(r"(\w+)(?::(\w+))?(?:-(off|bf16|int8))?(?:-(tp|ep|pp)(\d+))?", choice)
    if parsed is None or ((parsed[2] or parsed[3]) and parsed[1] != "ours"):
        likes = "ours, ours:triton, ours-int8, ours-tp2, marlin-ep2, bf16"
        raise ValueError(f"--choices has {choice!r}, expected such as {likes}")
    name, backend, dense, parallel, ranks = parsed.groups()
    arguments: dict[str, Any] = {"quantization": "mxfp4", "moe_backend": name}
    if name == "ours":
        arguments = {"quantization": "mxfp4_sm120"}
        options = {key: value for key, value in (("backend", backend), ("dense", dense)) if value}
        if options:
            arguments["additional_config"] = {"mxfp4_sm120": options}
    elif name == "bf16":
        arguments = {"hf_overrides": {"quantization_config": None}, "load_format": "dummy"}
    if parallel == "pp":
        arguments["pipeline_parallel_size"] = int(ranks)
    elif parallel:
        arguments |= {"tensor_parallel_size": int(ranks), "enable_expert_parallel": parallel == "ep"}
    return arguments


def in_a_process(task: dict[str, Any], log: Path) -> dict[str, Any]:
    """`measure` in a process of its own, whose words go to `log`. Raises CalledProcessError if it fails."""
    result = log.with_suffix(".json")
    with log.open("w") as words:
        command = [sys.executable, __file__, "--measure", json.dumps(task | {"log": str(log)}), str(result)]
        subprocess.run(command, stdout=words, stderr=subprocess.STDOUT, check=True)
    return json.loads(result.read_text())


def said(log: str) -> Figures:
    """The figures that vLLM writes into its log."""
    figures = {"compiled while serving": float(len(set(COMPILED.findall(log))))}
    if loaded := LOADED.search(log):
        figures["weights GiB"], figures["load s"] = map(float, loaded.groups())
    if tokens := KV_CACHE.search(log):
        figures["KV cache tokens"] = float(tokens[1].replace(",", ""))
    return figures


def compare(first: Answer, second: Answer) -> tuple[str, float]:
    """Two engines' answers to one prompt: "the same", "tied" or "different", and by how much the log-probability of a

    token in both differs at most. What follows a tie is not looked at.
    """
    worst = 0.0
    for here, there in zip(first, second, strict=True):
        one, other = next(iter(here)), next(iter(there))
        listed_by_both = one in there and other in here
        difference = max(abs(here[token] - there[token]) for token in (one, other)) if listed_by_both else float("inf")
        if one != other:
            return ("tied" if difference <= TIE else "different"), worst
        worst = max(worst, difference)
    return "the same", worst


def compared(first: list[Answer], second: list[Answer]) -> Figures:
    outcomes = [compare(*answers) for answers in zip(first, second, strict=True)]
    figures = {
        kind: float(sum(kind == outcome for outcome, _ in outcomes)) for kind in ("the same", "tied", "different")
    }
    return {**figures, "log-probabilities within": max(difference for _, difference in outcomes)}


def show(results: dict[str, Figures]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", *results)
    for name in dict.fromkeys(name for figures in results.values() for name in figures):
        row = (figures.get(name) for figures in results.values())
        table.add_row(name, *("-" if x is None else f"{x:,.1f}" if x >= 30 else f"{x:.4g}" for x in row))
    Console().print(table)


def group_of(kernel: str) -> str:
    return next(group for group, names in GROUPS.items() if re.search(names, kernel, re.IGNORECASE))


def profile_lines(step: dict[str, Any]) -> Iterator[str]:
    """One decode step as a Markdown table: groups in order of their time, and each one's kernels."""
    kernels = sorted(step["kernels"].items(), key=lambda kernel: -kernel[1][1])
    total = sum(us for _, (_, us) in kernels)
    yield f"{step['us']:.0f} us a step, {total:.0f} of them in kernels\n"
    yield "| kernel | calls | us | share |\n|---|---|---|---|"
    groups = {group: [(name, *cost) for name, cost in kernels if group_of(name) == group] for group in GROUPS}
    spent = {group: sum(us for *_, us in members) for group, members in groups.items()}
    for group in sorted(spent, key=lambda group: -spent[group]):
        calls = sum(calls for _, calls, _ in groups[group])
        yield f"| **{group}** | {calls:.1f} | {spent[group]:.1f} | {spent[group] / total:.1%} |"
        for name, calls, us in groups[group]:
            if us > total / 1000:
                # Without return types, anonymous namespaces and arguments, which would fill lines.
                short = re.sub(r"\(anonymous namespace\)::|^void |\(.*", "", name)[:72].replace("|", "/")
                yield f"| `{short}` | {calls:.1f} | {us:.1f} | {us / total:.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers: Callable[[str], list[int]] = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser.add_argument("model")
    parser.add_argument("--choices", default="ours,marlin,triton,auto")
    parser.add_argument(
        "--concurrent", type=numbers, default=[1, 8, 64, 256], help="numbers of requests to serve at once"
    )
    parser.add_argument(
        "--profile", type=numbers, default=[], help="and those whose decode steps to show kernel by kernel"
    )
    parser.add_argument("--answer-tokens", type=int, default=ANSWER_TOKENS)
    parser.add_argument("--long", type=int, default=4096, help="tokens of the long prompts")
    parser.add_argument("--engine", type=json.loads, default={}, help="more arguments of vllm.LLM, as JSON")
    parser.add_argument("--json", type=Path, help="figures and profiles, written after each choice")
    parser.add_argument("--logs", type=Path, help="directory for vLLM's words (default: a temporary one)")
    given = parser.parse_args()

    logs = given.logs or Path(tempfile.mkdtemp(prefix="engine-"))
    logs.mkdir(parents=True, exist_ok=True)
    longest = max(2 * given.long, PROMPT_TOKENS + max(given.answer_tokens, COMPARED_TOKENS, LONG))
    most = max(COMPARED_PROMPTS, *given.concurrent, *given.profile)
    room = {"max_model_len": longest, "max_num_seqs": most, "skip_tokenizer_init": True, "jit_monitor_verbose": True}
    results: dict[str, Any] = {}
    answers: dict[str, list[Answer]] = {}
    try:
        choices = {choice: engine_arguments(choice) for choice in given.choices.split(",")}
    except ValueError as error:
        parser.error(str(error))
    for choice, arguments in choices.items():
        task = {
            "engine": {"model": given.model, **room, **arguments, **given.engine},
            "concurrent": given.concurrent,
            "profile": given.profile,
            "answer_tokens": given.answer_tokens,
            "long": given.long,
        }
        log = logs / f"{choice.replace(':', '-')}.log"
        begun = time.perf_counter()
        try:
            measured = in_a_process(task, log)
        except subprocess.CalledProcessError as error:
            print(f"{choice}: not measured, exit status {error.returncode}: {first_error(log)}; see {log}", flush=True)
            continue
        print(f"{choice}: measured in {time.perf_counter() - begun:.0f} s, log in {log}", flush=True)
        answers[choice] = measured["answers"]
        first = next(iter(answers))
        agreement = {
            f"answers as {first}: {name}": value for name, value in compared(answers[first], answers[choice]).items()
        }
        results[choice] = {
            "figures": measured["figures"] | said(log.read_text()) | (agreement if choice != first else {}),
            "profile": measured["profile"],
        }
        if given.json:
            given.json.write_text(json.dumps(results, indent=1) + "\n")
        for requests, step in measured["profile"].items():
            print(f"\n{choice}, a decode step of {requests}:", *profile_lines(step), sep="\n", flush=True)
    show({choice: result["figures"] for choice, result in results.items()})
    sys.exit(len(results) < len(choices))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        Path(sys.argv[3]).write_text(json.dumps(measure(json.loads(sys.argv[2]))))
    else:
        main()
