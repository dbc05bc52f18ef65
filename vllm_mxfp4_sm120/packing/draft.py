# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's folder written shard by shard under another name, which a later run can go on with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vllm_mxfp4_sm120.checkpoint.headers import INDEX, read_json
from vllm_mxfp4_sm120.checkpoint.write import save
from vllm_mxfp4_sm120.drafts import alone, expect_new, naming
from vllm_mxfp4_sm120.packing.manifest import Progress, sha256, write_sums

SHARD_BYTES = 1 << 30
STATE = "progress.json"


class Stopped(KeyboardInterrupt):
    """The user ended the run; the draft is there for the next one, as the message says."""


@dataclass(frozen=True)
class Unit:
    """Tensors that are made together. `nbytes` is what they take; `make` gives them, and what is to be reported."""

    name: str
    nbytes: int
    make: Callable[[], Made]


@dataclass
class Made:
    """`tensors` go to the model's shards, `beside` to a file that isn't in the index."""

    tensors: dict[str, Tensor]
    beside: dict[str, Tensor] = field(default_factory=dict)
    report: dict[str, Any] | None = None


@dataclass(frozen=True)
class Job:
    """What is to be written: `identity` tells one job from another, `finish` adds what isn't a shard and checks it."""

    units: Sequence[Unit]
    identity: dict[str, Any]
    finish: Callable[[Path, list[dict[str, Any]]], None]
    beside_name: str = "beside-{}"
    shard_bytes: int = SHARD_BYTES


def write(directory: Path, job: Job, progress: Progress = lambda name, done, total: None) -> list[dict[str, Any]]:
    """Write the folder, whole or not at all; returns the units' reports.

    Everything goes to DIRECTORY.partial, which takes its name at the end. What ends a run, be it Ctrl-C or a power
    failure, leaves whole shards there, and at most one NAME.part: the same call goes on after them.
    Memory: a shard's tensors. Raises ValueError if `directory` isn't new or empty, if its disk has no room, or if the
    draft is of another job; BlockingIOError if another run is writing it; Stopped for Ctrl-C. What `make` and `finish`
    raise comes through; after a ValueError of theirs, nothing is left.
    """
    directory = directory.absolute()
    expect_new(directory)
    draft = directory.with_name(directory.name + ".partial")
    draft.mkdir(parents=True, exist_ok=True)
    with alone(draft), naming(directory):
        state = _resumed(draft, job)
        try:
            reports = _write_shards(draft, job, state, progress)
            job.finish(draft, reports)
            write_sums(draft, {name: file["sha256"] for name, file in _state(draft)["files"].items()}, leave_out=STATE)
        except KeyboardInterrupt as error:
            raise Stopped(f"stopped; what is done lies in {draft}: the same command goes on from there") from error
        except ValueError:  # the source is bad: nothing to go on with
            shutil.rmtree(draft)
            raise
        (draft / STATE).unlink()
        _sync(draft)
        draft.rename(directory)
        _sync(directory.parent)
    return reports


def _write_shards(draft: Path, job: Job, state: dict[str, Any], progress: Progress) -> list[dict[str, Any]]:
    plan = list(_shards(job.units, job.shard_bytes))
    total, done = sum(unit.nbytes for unit in job.units), 0
    _check_room(draft, total - sum(file["bytes"] for file in state["files"].values()))
    weight_map: dict[str, str] = {}
    for number, units in enumerate(plan, 1):
        name = f"model-{number:05}-of-{len(plan):05}.safetensors"
        if str(number) not in state["shards"]:
            tensors: dict[str, Tensor] = {}
            beside: dict[str, Tensor] = {}
            reports = []
            within = done
            for unit in units:
                progress(unit.name, within, total)
                made = unit.make()
                tensors |= made.tensors
                beside |= made.beside
                reports += [] if made.report is None else [made.report]
                within += unit.nbytes
            if beside:
                _save(draft, job.beside_name.format(f"{number:05}.safetensors"), beside, state)
            _save(draft, name, tensors, state)
            state["shards"][str(number)] = {"tensors": list(tensors), "reports": reports}
            _write_json(draft / STATE, state)
        done += sum(unit.nbytes for unit in units)
        weight_map |= dict.fromkeys(state["shards"][str(number)]["tensors"], name)
        progress(units[-1].name, done, total)
    size = sum(file["tensor_bytes"] for name, file in state["files"].items() if name in weight_map.values())
    _write_json(draft / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    return [report for number in range(1, len(plan) + 1) for report in state["shards"][str(number)]["reports"]]


def _shards(units: Sequence[Unit], shard_bytes: int) -> Iterator[list[Unit]]:
    shard: list[Unit] = []
    for unit in units:
        if shard and sum(each.nbytes for each in shard) + unit.nbytes > shard_bytes:
            yield shard
            shard = []
        shard.append(unit)
    if shard:
        yield shard


def _save(draft: Path, name: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    part = draft / f"{name}.part"
    save(tensors, part)
    part.chmod(0o666 & ~_umask())  # safetensors writes for the owner only
    _sync(part)
    state["files"][name] = {
        "sha256": sha256(part),
        "bytes": part.stat().st_size,
        "tensor_bytes": sum(tensor.nbytes for tensor in tensors.values()),
    }
    part.rename(draft / name)


def _resumed(draft: Path, job: Job) -> dict[str, Any]:
    """The state of an earlier run, if it was of this job and its files are as it left them."""
    for part in draft.glob("*.part"):
        part.unlink()
    if not (draft / STATE).exists():
        if any(draft.iterdir()):
            raise ValueError(f"{draft}: not an unfinished checkpoint of this program; move it away")
        state = {"identity": job.identity, "files": {}, "shards": {}}
        _write_json(draft / STATE, state)
        return state
    state = _state(draft)
    if state.get("identity") != json.loads(json.dumps(job.identity)):
        raise ValueError(f"{draft}: is of another source, version or other options; remove it to start again")
    for name, file in state["files"].items():
        if not (draft / name).is_file() or sha256(draft / name) != file["sha256"]:
            raise ValueError(f"{draft / name}: not as it was written; remove {draft} to start again")
    return state


def _state(draft: Path) -> dict[str, Any]:
    return read_json(draft / STATE)


def _check_room(draft: Path, need: int) -> None:
    free = shutil.disk_usage(draft).free
    if need > free:
        raise ValueError(
            f"{draft}: {need:,} more bytes are to be written, {free:,} are free there; choose another disk"
        )


def _write_json(path: Path, value: Any) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    part.rename(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
