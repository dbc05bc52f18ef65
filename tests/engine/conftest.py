# SPDX-License-Identifier: Apache-2.0
"""Real vLLM engines, each started once for all tests, and what transformers says of the same checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_mxfp4_sm120 import config_path, selector
from vllm_mxfp4_sm120.checkpoint import Sizes
from vllm_mxfp4_sm120.cli.serve import Server

PROMPT_LENGTHS = (1, 2, 5, 9, 16, 31, 47, 70)  # the tiny model's sliding window is 32
MAX_TOKENS = 32
# Nothing here may reach for the network.
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}

# For ranks that share a machine: by itself vLLM wants a NUMA node for each.
ONE_OF_SEVERAL = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Answers:
    """Greedy tokens and their log-probabilities for each prompt; the rest as generate.py says."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    quantization: str | None = None
    layers: Sequence[dict[str, list]] = ()
    scores: Sequence[list[float]] = ()
    cached: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)

    def worst_difference(self, other: Answers) -> float:
        """The largest difference of a log-probability. The tokens must be the same."""
        assert self.tokens == other.tokens
        difference = (torch.tensor(self.logprobs) - torch.tensor(other.logprobs)).abs().max().item()
        print(f"log-probabilities differ by at most {difference:.4f}")  # pytest -rP shows it
        return difference


def generate(
    model: Path,
    prompts: list[list[int]],
    directory: Path,
    env: dict[str, str] | None = None,
    vllm_routes: bool = False,
    rounds: int = 1,
    score: bool = False,
    **engine: Any,
) -> Answers:
    """Greedy answers of an engine in a process of its own. Raises CalledProcessError, its log being in `directory`."""
    engine = {"model": str(model), "max_model_len": 512, "kv_cache_memory_bytes": 1 << 26, **engine}
    if engine.get("tensor_parallel_size", 1) * engine.get("pipeline_parallel_size", 1) == 1:
        ranks = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # one process is enough, and starts in half of the time
    else:
        ranks = ONE_OF_SEVERAL
    task = {"engine": engine, "prompts": prompts, "max_tokens": MAX_TOKENS, "rounds": rounds, "score": score}
    task["vllm_routes"] = vllm_routes
    result = directory / "answers.json"
    with (directory / "engine.log").open("w") as log:
        subprocess.run(
            [sys.executable, "-m", "tests.engine.generate", str(result)],
            cwd=Path(__file__).parents[2],
            input=json.dumps(task),
            text=True,
            check=True,
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=600,
            env={**ENV, **ranks, **(env or {})},
        )
    return Answers(**json.loads(result.read_text()))


@pytest.fixture(scope="session")
def prompts(tiny_config: dict) -> list[list[int]]:
    """8 prompts of different lengths, the longest more than twice the sliding window."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(4, tiny_config["vocab_size"], (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]


@pytest.fixture(scope="session")
def choice(tiny_config: dict) -> selector.Choice:
    """The backend that must answer on this machine: tiled, where there is no GPU."""
    return selector.select(selector.this_machine(), Sizes.from_config(tiny_config).layer)


def transformers_answers(model, prompts: list[list[int]]) -> Answers:
    tokens, logprobs = [], []
    for ids in prompts:
        out = model.generate(
            torch.tensor([ids]),
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = out.sequences[0, len(ids) :]
        steps = torch.stack(out.logits)[:, 0].log_softmax(-1)
        tokens.append(new.tolist())
        logprobs.append(steps.gather(1, new[:, None])[:, 0].tolist())
    return Answers(tokens, logprobs)


@pytest.fixture(scope="session")
def expected(transformers_model, prompts: list[list[int]]) -> Answers:
    return transformers_answers(transformers_model, prompts)


@pytest.fixture(scope="session")
def offline(tiny: Path, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """LLM.generate through this plugin, in one process."""
    return generate(tiny, prompts, tmp_path_factory.mktemp("offline"), quantization="mxfp4_sm120", enforce_eager=True)


@pytest.fixture(scope="session")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`vllm serve` through this plugin, compiled as it is by default."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    with Server(str(tiny), ["--config", str(config_path("serve", "tiny.yaml"))], log, env=ENV) as running:
        running.wait_until_healthy(600)
        yield running
