# SPDX-License-Identifier: Apache-2.0
"""What child.py starts, by its path: one JSON task as argument, one JSON answer on stdout.

Only the standard library is imported before the process is tied to its parent and knows where to find modules.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent: int, parent_lives: int) -> None:
    """Tie this process to its parent, `parent_lives` being a pipe that closes when that ends, in whatever way.

    The kernel kills this process even where it hangs in a driver's call. What it has started by then, compilers, the
    kernel leaves: a process of their group waits for the pipe and ends them all.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(1)
    if os.fork() == 0:
        for stream in (0, 1, 2):
            os.close(stream)
        os.read(parent_lives, 1)
        os.killpg(0, signal.SIGKILL)
    os.close(parent_lives)


def load_package() -> None:
    """Make `vllm_mxfp4_sm120` the package that this file lies in, wherever else another one may be found."""
    root = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location(
        root.name, root / "__init__.py", submodule_search_locations=[str(root)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[root.name] = package
    spec.loader.exec_module(package)


def solve(task: dict[str, Any]) -> dict[str, Any]:
    """The task's outcome, as a dictionary of `Proof`."""
    from vllm_mxfp4_sm120 import proof
    from vllm_mxfp4_sm120.moe import Activation, MoEShape

    module, name = task["backend"].split(":")
    backend: Any = importlib.import_module(module)
    for part in name.split("."):
        backend = getattr(backend, part)
    shape = MoEShape(**task["shape"] | {"activation": Activation(task["shape"]["activation"])})
    return asdict(proof.solve(backend, shape, task["device"]))


def main(task: dict[str, Any]) -> None:
    end_with_parent(task["parent"], task["parent_lives"])
    sys.path[:] = task["path"]
    # What libraries print goes to stderr: stdout is for the answer alone.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answer:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        load_package()
        answer.write(json.dumps(solve(task)))


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except Exception:
        traceback.print_exc(limit=4)
        sys.exit(1)
