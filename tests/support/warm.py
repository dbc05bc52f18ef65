# SPDX-License-Identifier: Apache-2.0
"""Processes in which vLLM is imported already: forks of one that has done it, which takes longer than a small engine.

`python -m tests.support.warm FD` is that one. It runs nothing itself, has one thread, and never saw this plugin.
"""

from __future__ import annotations

import atexit
import gc
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
# What an engine on a CPU imports as it starts. A vLLM that lacks one imports others then.
MODULES = (
    "vllm.entrypoints.llm",
    "vllm.lora.request",
    "vllm.model_executor.models.gpt_oss",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
)
MOST_BYTES = 1 << 16  # of a request
# Read as a module is imported, and so from here. What else is in a request's environment is read later.
AT_IMPORT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True)
class Request:
    """`python -m module arguments`. With `fork`, an engine's ranks, which on CPUs vLLM spawns, are forked."""

    module: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    fork: bool


def run(
    module: str, *arguments: object, environment: Mapping[str, str], log: Path, fork: bool = True, timeout: float = 600
) -> None:
    """`python -m module arguments` in the repository's root, its output in `log`.

    Raises CalledProcessError, TimeoutError. Whatever happens, to this process too, nothing of it is left.
    """
    request = Request(module, [*map(str, arguments)], {**os.environ, **AT_IMPORT, **environment}, fork)
    hold, theirs = socket.socketpair()
    with hold, log.open("w") as output:
        with theirs:
            socket.send_fds(warm(), [json.dumps(asdict(request)).encode()], [theirs.fileno(), output.fileno()])
        hold.settimeout(timeout)
        status = int(hold.recv(16) or -signal.SIGKILL)
    if status:
        raise subprocess.CalledProcessError(status, ["python", "-m", module, *request.arguments])


@cache
def warm() -> socket.socket:
    """Where the process that forks is asked. It ends with this one."""
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-m", "tests.support.warm", str(theirs.fileno())]
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **AT_IMPORT},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    return ours


def main(channel: socket.socket) -> None:
    gc.disable()
    for module in MODULES:
        with suppress(ImportError):
            import_module(module)
    collect_no_more()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a watcher
    while True:
        message, descriptors, *_ = socket.recv_fds(channel, MOST_BYTES, 2)
        if not message:
            return
        if os.fork() == 0:
            channel.close()
            watch(Request(**json.loads(message)), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def collect_no_more() -> None:
    """What is imported is collected for half a second, each time: before an engine starts, after it, at its ends.

    vLLM itself freezes it, but later, and unfreezes it when it cleans up.
    """
    gc.freeze()
    gc.unfreeze = lambda: None
    gc.enable()


def watch(request: Request, hold: int, output: int) -> NoReturn:
    """Fork once more, and end that process with all that it started, once it has ended or nobody waits for it."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        os.close(hold)
        become(request, output)
    ended = os.pidfd_open(child)
    if ended in select.select([ended, hold], [], [])[0]:
        os.write(hold, str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
    os.killpg(0, signal.SIGKILL)
    raise AssertionError("unreachable")


def become(request: Request, output: int) -> NoReturn:
    """Run the module. Python's own end takes a second, for thousands of modules."""
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.clear()
    os.environ.update(request.environment)
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":  # read as torch is imported
        import_module("torch._dynamo.config").disable = True
    if request.fork and import_module("vllm.platforms").current_platform.is_cpu():
        fork_what_is_spawned()
    sys.argv = [request.module, *request.arguments]
    status = 0
    try:
        runpy.run_module(request.module, run_name="__main__", alter_sys=True)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def fork_what_is_spawned() -> None:
    get_context = multiprocessing.get_context

    def forks(method: str | None = None) -> Any:
        return get_context("fork" if method == "spawn" else method)

    multiprocessing.get_context = forks  # type: ignore[assignment]


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
