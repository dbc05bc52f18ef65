# SPDX-License-Identifier: Apache-2.0
"""A proof in a process of its own, which may crash or hang without harm to the one that serves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vllm_mxfp4_sm120 import settings
from vllm_mxfp4_sm120.backends.base import Backend
from vllm_mxfp4_sm120.lifeline import tied
from vllm_mxfp4_sm120.moe import MoEShape
from vllm_mxfp4_sm120.proof.problem import Proof

SOLVER = "vllm_mxfp4_sm120.proof.problem:solve_named"  # of backends
SCRIPT = Path(__file__).with_name("child_main.py")


def solve_in_child(backend: type[Backend], shape: MoEShape, device: torch.device | str, seconds: float) -> Proof:
    """Run a backend's problem in a process of its own."""
    arguments = {
        "backend": f"{backend.__module__}:{backend.__qualname__}",
        "shape": asdict(shape),
        "device": str(device),
    }
    return run_in_child(SOLVER, arguments, seconds)


def run_in_child(solver: str, arguments: dict[str, Any], seconds: float) -> Proof:
    """The `Proof` of a function, "module:name", of arguments that JSON can hold.

    In a process that ends with this one, however this one ends.
    """
    task = {"solver": solver, "arguments": arguments, "path": import_path()}
    options: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "stdin": subprocess.DEVNULL,
        # Also for the processes that compilers start: none looks for modules where it happens to stand.
        "env": {**os.environ, "PYTHONSAFEPATH": "1"},
        "cwd": "/",
        "text": True,
        "errors": "replace",
    }
    try:
        with tied([sys.executable, str(SCRIPT), json.dumps(task)], **options) as child:
            return outcome(child, *child.communicate(timeout=seconds))
    except subprocess.TimeoutExpired:
        return Proof(f"no answer within {seconds:g} s ({settings.PROOF_SECONDS.name})", final=False)
    except OSError as error:
        return Proof(f"its process could not be started: {error}", final=False)


def outcome(child: subprocess.Popen[str], out: str, err: str) -> Proof:
    """What a child that ended by itself has found."""
    try:
        return Proof(**json.loads(out))
    except (TypeError, ValueError):
        last = (err.strip().splitlines() or ["it said nothing"])[-1][:200]
        return Proof(f"its process died ({how_it_ended(child.returncode)}): {last}", final=False)


def how_it_ended(status: int) -> str:
    """In words, as Popen counts: below 0 it was a signal."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def import_path() -> list[str]:
    """Where this process finds modules, without the working directory: anybody's `torch.py` may lie there.

    It stays if PYTHONPATH names it in full, as the images of some services do.
    """
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    try:
        here = os.path.realpath(os.getcwd())
    except FileNotFoundError:  # deleted meanwhile
        here = ""
    return [entry for entry in sys.path if os.path.isabs(entry) and (entry in named or os.path.realpath(entry) != here)]
