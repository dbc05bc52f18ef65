# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` through this plugin, asked over HTTP: by one client, by many at once, and while its engine is killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from benchmarks import load
from tests.engine.conftest import ENV, MAX_TOKENS, TOLERANCE, Answers
from vllm_mxfp4_sm120 import config_path
from vllm_mxfp4_sm120.cli.server import Server, check_port
from vllm_mxfp4_sm120.selector import Choice


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`vllm serve` through this plugin, compiled as it is by default."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    with Server(str(tiny), ["--config", str(config_path("serve", "tiny.yaml"))], log, env=ENV) as running:
        running.wait_until_healthy(600)
        yield running


def test_http_is_transformers(server: Server, expected: Answers, prompts: list[list[int]], choice: Choice) -> None:
    options = {"logprobs": 0, "return_token_ids": True, "ignore_eos": True}
    choices = [server.complete(ids, MAX_TOKENS, **options)["choices"][0] for ids in prompts]
    answers = Answers(
        [choice["token_ids"] for choice in choices], [choice["logprobs"]["token_logprobs"] for choice in choices]
    )
    assert server.answered_by() == str(choice)
    assert "quantization=mxfp4_sm120" in server.log.read_text()
    assert answers.worst_difference(expected) < TOLERANCE


def test_under_load_each_answer_is_the_one_alone(server: Server, tiny_config: dict) -> None:
    alone = {task: load.ask(server, task) for task in load.tasks(8, tiny_config["vocab_size"])}
    outcome = load.load(server, alone, requests=60, clients=12)
    print(outcome)  # pytest -rP shows it
    assert (outcome.finished, outcome.given_up, outcome.other_tokens) == (40, 20, 0)
    assert outcome.worst < load.TOLERANCE


def test_a_killed_engine_leaves_nothing_and_a_restart_serves(server: Server, tiny: Path, tmp_path: Path) -> None:
    """The last test: it ends the server that all share."""
    task = load.Task((5, 6, 7), 8)
    answer, before = load.ask(server, task), load.family(server)
    assert "answer" not in load.kill_engine(server, load.Task((5,) * 100, 400))
    server.__exit__(None, None, None)
    assert not psutil.wait_procs(before, 10)[1]
    assert server.port is not None
    check_port("127.0.0.1", server.port)
    with ExitStack() as stack:
        assert load.ask(load.start(stack, str(tiny), tmp_path, server.port), task).tokens == answer.tokens
