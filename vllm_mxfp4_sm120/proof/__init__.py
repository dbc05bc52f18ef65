# SPDX-License-Identifier: Apache-2.0
"""Proof before use: a backend solves a small problem on this device, against the reference, before it may serve.

Kernels of a backend's own can hang, or poison the CUDA context so that nothing in the process works any more: they are
tried in a child process with a time limit, and the answer is remembered per machine and versions. Plain torch
is tried in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_mxfp4_sm120 import settings
from vllm_mxfp4_sm120.backends.base import Backend
from vllm_mxfp4_sm120.cache import cache_dir
from vllm_mxfp4_sm120.moe import MoEShape
from vllm_mxfp4_sm120.platform import Machine
from vllm_mxfp4_sm120.proof.child import run_in_child, solve_in_child
from vllm_mxfp4_sm120.proof.problem import (
    EXPERTS,
    TOKENS,
    Proof,
    device,
    problem_shape,
    random_inputs,
    random_router,
    random_weights,
    solve,
)
from vllm_mxfp4_sm120.proof.record import forget, path_for, recall, record_path, remember, turn, version

__all__ = [
    "EXPERTS",
    "MARGIN",
    "TOKENS",
    "Proof",
    "ask",
    "cache_dir",
    "device",
    "forget",
    "once",
    "path_for",
    "problem_shape",
    "random_inputs",
    "random_router",
    "random_weights",
    "recall",
    "record_path",
    "remember",
    "run_in_child",
    "solve",
    "solve_in_child",
    "version",
    "why_not",
]


# A kernel answers in place of another where it took at most so much of its time in the proof's process: less than what
# two measurements of the same may differ by is no gain.
MARGIN = 0.98


def why_not(backend: type[Backend], machine: Machine, shape: MoEShape) -> str | None:
    """One line saying how the backend failed on a small problem like `shape`, on this device; None if it's right.

    Nothing about the cache of earlier proofs (unreadable, read-only, full, absent) keeps this from answering.
    """
    if not backend.compiled:
        return solve(backend, problem_shape(machine, shape), device(machine)).reason
    seconds = settings.PROOF_SECONDS.get()
    return once(
        record_path(backend, machine, shape),
        lambda: solve_in_child(backend, problem_shape(machine, shape), device(machine), seconds),
        seconds,
    ).reason


def ask(name: str, solver: str, machine: Machine, arguments: dict[str, Any]) -> Proof:
    """What a function, "module:name", finds on this device in a process of its own, or found there before.

    It is called with `arguments`, which JSON can hold, and with the device's name as `device`. `name` is the record's.
    """
    seconds = settings.PROOF_SECONDS.get()
    task = {**arguments, "device": str(device(machine))}
    return once(path_for(name, machine, arguments), lambda: run_in_child(solver, task, seconds), seconds)


def once(record: Path | None, solve: Callable[[], Proof], seconds: float) -> Proof:
    """What is remembered; else what `solve` finds, in one process of a machine at a time, which is remembered then."""
    known = recall(record)
    if known is None:
        with turn(record, seconds):
            known = recall(record)  # of the process that was waited for
            if known is None:
                proof = solve()
                remember(record, proof)
                return proof
    if known.reason is None:
        return known
    return replace(known, reason=f"{known.reason} (remembered; `mxfp4-sm120 doctor --forget` tries again)")
