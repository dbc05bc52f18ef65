"""`mxfp4-sm120 serve MODEL`: vllm serve with this plugin on a free port, one completion, and who answered it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
PROMPT = "A mixture of experts holds"
# The line that quantization/fused_moe.py logs in the process that holds the layers.
ANSWERED_BY = re.compile(r"mxfp4_sm120: (MXFP4 experts on .*)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a checkpoint's directory or its name on the hub")
    parser.add_argument("--port", type=int, help="of 127.0.0.1 (default: one that is free)")
    parser.add_argument("--prompt", default=PROMPT, help=f"of the completion (default: {PROMPT!r})")
    parser.add_argument("--max-tokens", type=int, default=32, help="of the completion (default 32)")
    parser.add_argument("--once", action="store_true", help="stop after the completion")
    parser.epilog = "What follows -- goes to vllm serve as it is."


def run(args: argparse.Namespace) -> int:
    extra = args.passed_on
    if not any("quantization" in argument or argument == "--config" for argument in extra):
        extra = ["--quantization", "mxfp4_sm120", *extra]
    log = Path(tempfile.mkdtemp(prefix="mxfp4-sm120-")) / "server.log"
    with Server(args.model, extra, log, args.port) as server:
        print("starting:", " ".join(server.command), flush=True)
        print(f"its log:  {log}\nwaiting until it is healthy: a minute or two, longer for a large model", flush=True)
        try:
            seconds = server.wait_until_healthy()
            print(f"healthy after {seconds:.0f} s at {server.url}\n")
            completion = server.complete(args.prompt, args.max_tokens)
            print(f"prompt:      {args.prompt!r}\ncompletion:  {completion['choices'][0]['text']!r}")
            print(f"answered by: {server.answered_by() or 'NOT this plugin: vLLM used a method of its own'}")
            if not args.once:
                print(f"\nserving {args.model} at {server.url}/v1/completions until Ctrl-C", flush=True)
                server.process.wait()
                raise RuntimeError(f"the server ended by itself, exit status {server.process.returncode}; see {log}")
        except KeyboardInterrupt:
            print("\nstopping", flush=True)
    return 0


@dataclass
class Server:
    """`vllm serve` in a process group of its own; as a context manager it is stopped at the end, workers included.

    stdout and stderr go to `log`. `port` None takes one that is free.
    """

    model: str
    arguments: Sequence[str]
    log: Path
    port: int | None = None
    env: dict[str, str] | None = None

    def __enter__(self) -> Server:
        self.port = self.port or free_port()
        self.url = f"http://{HOST}:{self.port}"
        vllm = str(Path(sys.executable).with_name("vllm"))
        self.command = [vllm, "serve", self.model, "--host", HOST, "--port", str(self.port)]
        self.command += [*self.arguments, *eager_if_nothing_compiles()]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=self.env
            )
        self.started = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        # SIGINT is what vLLM shuts down cleanly for. What is left of the group after that is killed.
        for number, seconds in ((signal.SIGINT, 20), (signal.SIGKILL, 10)):
            if self.process.poll() is None:
                self.process.send_signal(number)
                try:
                    self.process.wait(seconds)
                except subprocess.TimeoutExpired:
                    continue
        kill_group(self.process.pid)

    def wait_until_healthy(self, timeout: float = 1800) -> float:
        """Seconds from start until /health answers. Raises RuntimeError with the log's end if the server dies."""
        while time.monotonic() - self.started < timeout:
            if self.process.poll() is not None:
                status, why = self.process.returncode, first_error(self.log)
                raise RuntimeError(f"vllm serve ended with exit status {status}: {why}; see {self.log}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return time.monotonic() - self.started
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise RuntimeError(f"vllm serve was not healthy within {timeout:.0f} s; see {self.log}")

    def complete(self, prompt: str | list[int], max_tokens: int, **options: Any) -> dict[str, Any]:
        """One greedy completion over HTTP, as /v1/completions answers it."""
        # The chat endpoint would need GPT-OSS's own vocabulary from the network.
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **options}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)

    def answered_by(self) -> str | None:
        """What this plugin's layers said of themselves as they were made, None if there were none."""
        found = ANSWERED_BY.search(self.log.read_text(errors="replace"))
        return found and found.group(1)


def first_error(log: Path) -> str:
    """The line of vLLM's log that says what went wrong; later ones only say that something did."""
    text = log.read_text(errors="replace")
    # Errors of configuration come inside pydantic's, those of worker processes behind the logger's prefix.
    found = re.search(r"Value error, (.*?)(?: \[type=|$)", text, re.M) or re.search(
        r"(?:^|\] )((?:\w+\.)*\w+Error: .*)$", text, re.M
    )
    return found.group(1) if found else (text.strip().splitlines() or ["it said nothing"])[-1]


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def kill_group(pid: int) -> None:
    """End what is left of a process group, if anything is."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def eager_if_nothing_compiles() -> list[str]:
    """On a CPU vLLM compiles its model with the system's C++ compiler; without one it has to run uncompiled."""
    import torch

    if torch.cuda.is_available() or shutil.which("g++") or shutil.which("clang++"):
        return []
    print("no C++ compiler here: serving with --enforce-eager")
    return ["--enforce-eager"]
