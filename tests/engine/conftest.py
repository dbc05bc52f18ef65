# SPDX-License-Identifier: Apache-2.0
"""Real vLLM engines, each started once for all tests, and what transformers says of the same checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import MadeOnce
from tests.support import warm
from vllm_mxfp4_sm120 import selector
from vllm_mxfp4_sm120.checkpoint import Sizes
from vllm_mxfp4_sm120.memory import upcast_bytes
from vllm_mxfp4_sm120.mxfp4 import BLOCK

PROMPT_LENGTHS = (1, 2, 5, 9, 16, 31, 47, 70)  # the tiny model's sliding window is 32
MAX_TOKENS = 32
TOLERANCE = 2e-2  # of a log-probability
RESULT = "answers.json"  # what an engine leaves in its folder
# Nothing here may reach for the network.
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}

# For processes that share a machine, ranks of one engine or engines of several tests: by itself vLLM wants a NUMA node
# for each rank, and binds every engine to the same cores.
ONE_OF_SEVERAL = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
# One process is enough for one rank, and starts in half of the time.
ONE_PROCESS = {**ONE_OF_SEVERAL, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# Even an eager engine compiles how it ranks a token's log-probability, anew for each size of a batch.
EAGER = {"TORCHDYNAMO_DISABLE": "1"}


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

    @classmethod
    def read(cls, directory: Path) -> Answers:
        return cls(**json.loads((directory / RESULT).read_text()))

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
    adapters: list[str | None] | None = None,
    spawn: bool = False,
    **engine: Any,
) -> Answers:
    """Greedy answers of an engine in a process of its own. Raises CalledProcessError, its log being in `directory`.

    With `spawn` its ranks are spawned, as vLLM does it on CPUs, where a fork is ready seconds earlier.
    """
    engine = {"model": str(model), "max_model_len": 512, "kv_cache_memory_bytes": 1 << 26, **engine}
    ranks = engine.get("tensor_parallel_size", 1) * engine.get("pipeline_parallel_size", 1)
    how = (ONE_PROCESS if ranks == 1 else ONE_OF_SEVERAL) | (EAGER if engine.get("enforce_eager") else {})
    task = {"engine": engine, "prompts": prompts, "max_tokens": MAX_TOKENS, "rounds": rounds, "score": score}
    task |= {"vllm_routes": vllm_routes, "adapters": adapters}
    warm.run(
        "tests.engine.generate",
        *(directory / RESULT, json.dumps(task)),
        environment={**ENV, **how, **(env or {})},
        log=directory / "engine.log",
        fork=not spawn,
    )
    return Answers.read(directory)


def assert_ours(answers: Answers, config: dict, choice: selector.Choice, tp: int = 1, ep: int = 1, pp: int = 1) -> None:
    """The engine took our method; every layer of every rank holds it, the right backend, packed weights only."""
    assert answers.quantization == "mxfp4_sm120"
    assert len(answers.layers) == tp * ep * pp
    experts, blocks = config["num_local_experts"] // ep, -(-config["intermediate_size"] // tp // BLOCK)
    shape = replace(Sizes.from_config(config).layer, local_experts=experts, intermediate_size=blocks * BLOCK)
    biases = 2 * (2 * shape.intermediate_size + shape.hidden_size)
    for rank in answers.layers:
        assert len(rank) == config["num_hidden_layers"] // pp
        for method, backend, nbytes in rank.values():
            assert (method, backend) == ("Mxfp4Sm120MoEMethod", choice.backend.name)
            if backend == "tiled":  # others may pad
                assert nbytes == experts * (shape.packed_bytes_per_expert + biases)
            assert nbytes < upcast_bytes(shape) / 2


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
def offline(tiny: Path, prompts: list[list[int]], made_once: MadeOnce) -> Answers:
    """LLM.generate through this plugin, in one process."""
    engine = {"quantization": "mxfp4_sm120", "enforce_eager": True}
    return Answers.read(made_once("offline", lambda folder: generate(tiny, prompts, folder, **engine)))
