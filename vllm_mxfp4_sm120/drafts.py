# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all, however their writing ends, and places for one process at a time."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vllm_mxfp4_sm120.log import logger


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place at the end, and is removed if anything is raised.

    Everybody may read it, this user alone write it, whatever the umask is. Raises OSError, naming the file.
    """
    with naming(path):
        file, name = tempfile.mkstemp(prefix=f".{path.stem}-", dir=path.parent)
        draft = Path(name)
        try:
            try:
                os.fchmod(file, 0o644)
            finally:
                os.close(file)
            yield draft
            os.replace(draft, path)
        except BaseException:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            raise


def expect_writable(folder: Path) -> None:
    """Raises OSError where no file can be made: asked before the work whose result is to lie there."""
    tempfile.TemporaryFile(dir=folder).close()


def expect_new(directory: Path) -> None:
    """Raises ValueError, naming it, unless the directory is to be made, or is empty: a draft can take its place."""
    if directory.is_symlink() or os.path.ismount(directory):
        raise ValueError(f"{directory}: a link or a mount point, expected a new name; give a folder within it")
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise ValueError(f"{directory}: already exists, expected a new name or an empty directory; remove it first")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError within names this file: a full disk's names none, a draft's one that nobody knows."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def alone(place: Path) -> Iterator[None]:
    """For one process at a time, by a lock on a folder or file that exists; it ends with the process.

    Raises BlockingIOError, naming the place, if another process has it. A file system without locks keeps nobody out.
    """
    handle = os.open(place, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{place}: another process is writing it, expected none; wait for it") from None
        except OSError as error:
            logger.debug("no lock on %s: %s", place, error)
        yield
    finally:
        os.close(handle)
