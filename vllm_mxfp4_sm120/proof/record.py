# SPDX-License-Identifier: Apache-2.0
"""Proofs that are remembered: one small JSON file each, named by all that could change the outcome.

Nothing here keeps a server from starting. What can't be read is as if it weren't there; what can't be written is said
once, and proved again at the next start.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path

from filelock import FileLock, Timeout

from vllm_mxfp4_sm120 import __version__, settings
from vllm_mxfp4_sm120.backends import tuning
from vllm_mxfp4_sm120.backends.base import Backend
from vllm_mxfp4_sm120.backends.native import library
from vllm_mxfp4_sm120.cache import cache_dir, make_folder, others_may_write, owner_trouble
from vllm_mxfp4_sm120.drafts import draft_of
from vllm_mxfp4_sm120.log import logger
from vllm_mxfp4_sm120.moe import MoEShape
from vllm_mxfp4_sm120.platform import Machine, driver
from vllm_mxfp4_sm120.proof.problem import Proof, problem_shape

PATIENCE = 3.0  # seconds of waiting for another process before it's said
LARGEST = 1 << 16  # bytes of a record: they are some hundred


def record_path(backend: type[Backend], machine: Machine, shape: MoEShape) -> Path | None:
    """The file that remembers a backend's proof, None where there is no place for it."""
    problem = (backend.__module__, backend.__qualname__, asdict(problem_shape(machine, shape)))
    return path_for(backend.name, machine, problem, getattr(sys.modules[backend.__module__], "__file__", None))


def path_for(name: str, machine: Machine, problem: object, source: str | None = None) -> Path | None:
    """The file that remembers how a problem went, which JSON can describe; `source` is code beside this package's."""
    if (folder := cache_dir()) is None:
        return None
    facts = (
        problem,
        __version__,
        _source_digest(machine, source),
        driver(),
        asdict(machine),
        {name: version(name) for name in ("torch", "triton", "flashinfer-python", "flashinfer-cubin")},
    )
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return folder / "proofs" / f"{name}-{digest[:24]}.json"


def recall(record: Path | None) -> Proof | None:
    """What is remembered; None if nothing is, if it can't be read, or if others could have written it."""
    if record is None:
        return None
    try:
        # The record may be a symbolic link into another folder, as Kubernetes mounts them.
        real = record.resolve()
        file = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # doesn't wait for a pipe's writer
        with open(file, "rb") as opened:
            state = os.fstat(file)
            if not stat.S_ISREG(state.st_mode):
                return None
            text = opened.read(LARGEST)
        if distrusted := owner_trouble(real, state) or others_may_write(record.parent) or others_may_write(real.parent):
            _say(distrusted)
            return None
        known = json.loads(text)
        reason, found = known["reason"], known.get("found")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # RuntimeError: links or braces without end
        return None
    readable = reason is None or (isinstance(reason, str) and reason.isprintable())
    return Proof(reason, found=found) if readable else None


def remember(record: Path | None, proof: Proof) -> None:
    """Write the record, whole or not at all; not what may go away by itself."""
    if not proof.final:
        return
    if record is None:
        return _say("this user has no home directory")
    try:
        make_folder(record.parent)
        if distrusted := others_may_write(record.parent):
            return _say(distrusted)
        with draft_of(record) as draft:  # nothing in it is secret, and who runs an image isn't who built it
            draft.write_text(json.dumps(asdict(proof)))
    except OSError as error:
        _say(f"{record.parent}: {error.strerror or error}")


def forget() -> int:
    """Forget every proof; how many there were. Raises OSError for one that can't be removed."""
    if (folder := cache_dir()) is None:
        return 0
    records = list((folder / "proofs").glob("*.json"))
    for record in (*records, *(folder / "proofs").glob(".*")):  # and drafts of processes that were killed
        record.unlink(missing_ok=True)
    return len(records)


@contextmanager
def turn(record: Path | None, seconds: float) -> Iterator[None]:
    """One process of a machine proves, the others wait for it, at most `seconds`, and read what it found.

    Where there can be no lock, or no end of the waiting, several prove the same at the same time: no harm but time.
    """
    lock = _lock(record, seconds)
    try:
        yield
    finally:
        if lock is not None:
            with suppress(OSError):
                lock.release()


def _lock(record: Path | None, seconds: float) -> FileLock | None:
    if record is None:
        return None
    try:
        make_folder(record.parent)
        if others_may_write(record.parent):
            return None
        lock = FileLock(record.with_suffix(".lock"))
        for patience, then in (
            (min(PATIENCE, seconds), "waiting for another process's proof of %s, at most %g s"),
            (seconds - PATIENCE, "another process's proof of %s took more than %g s: not waiting any longer"),
        ):
            with suppress(Timeout):
                lock.acquire(timeout=max(0.0, patience))
                return lock
            logger.info(then, record.name.partition("-")[0], seconds)
    except (OSError, NotImplementedError) as error:  # read-only, full, or a network's disk without locks
        logger.debug("no lock beside %s: %s", record, error)
    return None


@cache
def _say(why: str) -> None:
    """Once in a process."""
    name = settings.CACHE_DIR.name
    logger.warning("mxfp4_sm120: proofs are not remembered, each start repeats them: %s; %s names a place", why, name)


def version(distribution: str) -> str | None:
    """A distribution's version without importing it, None if it isn't installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _source_digest(machine: Machine, source: str | None) -> str:
    """Of everything in this package that the outcome depends on: code, compiled libraries, which kernel when."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted((*root.rglob("*.py"), *root.rglob("*.so"))):
        digest.update(path.read_bytes())
    for path in tuning.files():
        with suppress(OSError):  # a user's that can't be read isn't used either
            digest.update(path.read_bytes())
    with suppress(PermissionError):  # not loaded then, and its backend says why
        if cached := library.cached(machine.capability):
            digest.update(cached.read_bytes())
    if source is not None:
        digest.update(Path(source).read_bytes())
    return digest.hexdigest()
