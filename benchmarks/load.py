# SPDX-License-Identifier: Apache-2.0
"""Load and faults on a real server, by hand: `python benchmarks/load.py MODEL [--requests 1000 --clients 24]`.

Every answer under load is compared with the same request's alone; a third of the requests are given up midway. Then
the engine's process is killed under load: clients must get errors, nothing may stay behind, a restart must serve.
MODEL is a checkpoint for the CPU, as `mxfp4-sm120 make-tiny` writes it. Everything listens on 127.0.0.1.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil

from vllm_mxfp4_sm120.cli.server import Server, check_port

# A batch's other requests change the order of sums, never the result by more than BF16 resolves.
TOLERANCE = 2e-2  # of a log-probability
EAGER = ("--quantization", "mxfp4_sm120", "--enforce-eager", "--max-model-len", "512")
EAGER += ("--kv-cache-memory-bytes", f"{1 << 26}")
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
BROKEN = (OSError, RuntimeError, http.client.HTTPException, ValueError)  # what a client sees of a server that dies


@dataclass(frozen=True)
class Task:
    """One greedy request."""

    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """`leads`: how far each token's log-probability lies above the second best one's."""

    tokens: list[int]
    logprobs: list[float]
    leads: list[float]

    def same_tokens(self, other: Answer) -> int:
        """How many tokens are the same, from the first one on."""
        pairs = enumerate(zip(self.tokens, other.tokens, strict=True))
        return next((place for place, (one, another) in pairs if one != another), len(self.tokens))


@dataclass
class Outcome:
    """What a load came to. `worst` is the largest difference of a log-probability.

    Where two tokens are as good, to the tolerance, either is right, and what follows isn't compared.
    `memory` are the resident bytes of all processes after each fifth of the requests; the first is warm-up.
    """

    finished: int = 0
    given_up: int = 0
    other_tokens: int = 0
    worst: float = 0.0
    seconds: float = 0.0
    memory: tuple[int, ...] = ()

    def __str__(self) -> str:
        return (
            f"{self.finished} finished, {self.given_up} given up in {self.seconds:.0f} s; {self.other_tokens} with "
            f"other tokens than alone, log-probabilities off by at most {self.worst:.2g}; memory of all processes "
            f"after each fifth: {', '.join(f'{sample / 2**20:.0f}' for sample in self.memory)} MiB"
        )


def tasks(count: int, vocab_size: int, seed: int = 0) -> list[Task]:
    """Prompts of 1 to 200 tokens, answers of 1 to 48."""
    dice = random.Random(seed)
    return [
        Task(tuple(dice.randrange(4, vocab_size) for _ in range(dice.randint(1, 200))), dice.randint(1, 48))
        for _ in range(count)
    ]


def ask(server: Server, task: Task) -> Answer:
    """Raises one of BROKEN."""
    options = {"logprobs": 2, "return_tokens_as_token_ids": True, "return_token_ids": True, "ignore_eos": True}
    choice = server.complete(list(task.prompt), task.max_tokens, **options)["choices"][0]
    if len(choice["token_ids"]) != task.max_tokens:
        count, why = len(choice["token_ids"]), choice["finish_reason"]
        raise ValueError(f"{count} tokens of {task.max_tokens}: {why}")
    said = choice["logprobs"]
    best_two = (sorted(step.values())[-2:] for step in said["top_logprobs"])
    return Answer(choice["token_ids"], said["token_logprobs"], [best - second for second, best in best_two])


def give_up(server: Server, task: Task) -> None:
    """The same request, streamed; the client leaves after its first token."""
    body = {"model": server.model, "prompt": list(task.prompt), "max_tokens": 256, "ignore_eos": True, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        connection.getresponse().readline()
    finally:
        connection.close()


def load(server: Server, alone: dict[Task, Answer], requests: int, clients: int, seed: int = 1) -> Outcome:
    """Requests at once, compared with `alone`; a third of them given up. Raises what a request that failed raised."""
    dice, outcome = random.Random(seed), Outcome()
    plan = [(dice.choice(list(alone)), number % 3 == 2) for number in range(requests)]

    def one(step: tuple[Task, bool]) -> Answer | None:
        return give_up(server, step[0]) if step[1] else ask(server, step[0])

    start = time.monotonic()
    answers: list[Answer | None] = []
    with ThreadPoolExecutor(clients) as pool:
        for fifth in range(5):
            answers += pool.map(one, plan[fifth * requests // 5 : (fifth + 1) * requests // 5])
            outcome.memory += (memory(server),)
    outcome.seconds = time.monotonic() - start
    for (task, left), answer in zip(plan, answers, strict=True):
        if left or answer is None:
            outcome.given_up += 1
            continue
        outcome.finished += 1
        same = answer.same_tokens(alone[task])
        if same < task.max_tokens and alone[task].leads[same] > TOLERANCE:
            outcome.other_tokens += 1
        pairs = zip(answer.logprobs[:same], alone[task].logprobs[:same], strict=True)
        outcome.worst = max([outcome.worst, *(abs(one - other) for one, other in pairs)])
    return outcome


def family(server: Server) -> list[psutil.Process]:
    """The server and all that it has started."""
    process = psutil.Process(server.process.pid)
    return [process, *process.children(recursive=True)]


def memory(server: Server) -> int:
    """Bytes resident, pages that processes share counted for each."""
    total = 0
    for process in family(server):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def kill_engine(server: Server, task: Task, clients: int = 4) -> list[str]:
    """SIGKILL the engine's process while clients wait; what each of them got: "answer", or an error's class.

    Afterwards the server has ended. Raises subprocess.TimeoutExpired if it hasn't within two minutes.
    """
    engine = next(process for process in family(server) if "EngineCor" in process.name())

    def one(_: int) -> str:
        try:
            ask(server, task)
        except BROKEN as error:
            return type(error).__name__
        return "answer"

    with ThreadPoolExecutor(clients) as pool:
        engine.send_signal(signal.SIGSTOP)  # or a fast machine has answered one of them before it is killed
        waiting = [pool.submit(one, number) for number in range(clients)]
        time.sleep(0.3)
        engine.send_signal(signal.SIGKILL)
        server.process.wait(120)
        return [future.result(120) for future in waiting]


def start(stack: ExitStack, model: str, folder: Path, port: int | None = None, extra: Sequence[str] = ()) -> Server:
    log = folder / f"server-{time.monotonic_ns()}.log"
    server = stack.enter_context(Server(model, [*EAGER, *extra], log, port, env=ENV))
    server.wait_until_healthy(300)
    return server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=24)
    args = parser.parse_args()
    vocab_size = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        with ExitStack() as first:
            one = start(first, args.model, Path(folder))
            alone = {task: ask(one, task) for task in tasks(40, vocab_size)}
            print(f"load: {load(one, alone, args.requests, args.clients)}", flush=True)
            with ExitStack() as second:
                other = start(second, args.model, Path(folder))
                with ThreadPoolExecutor(2) as both:
                    for outcome in both.map(lambda server: load(server, alone, 60, 8), (one, other)):
                        print(f"two servers at once: {outcome}", flush=True)
            before = family(one)
            print(f"engine killed: {kill_engine(one, Task((5,) * 100, 400))}", flush=True)
        print(f"left behind: {psutil.wait_procs(before, 10)[1]}")
        check_port("127.0.0.1", one.port)
        again = start(stack, args.model, Path(folder), one.port)
        task, answer = next(iter(alone.items()))
        print(f"restart on the same port: {'same answer' if ask(again, task).tokens == answer.tokens else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
