# SPDX-License-Identifier: Apache-2.0
"""Where this user's cache and settings lie, and who else could have written there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from vllm_mxfp4_sm120 import settings


def cache_dir() -> Path | None:
    """Where proofs and libraries built here are kept; None for a user without a home directory who named no other."""
    try:
        if (given := settings.CACHE_DIR.get()) is not None:
            return Path(given).expanduser().absolute()
    except (RuntimeError, OSError):
        return None
    return user_folder("XDG_CACHE_HOME", "~/.cache")


def user_folder(variable: str, otherwise: str) -> Path | None:
    """This package's folder in the one that an XDG variable names; None for a user without a home directory."""
    base = Path(os.environ.get(variable) or otherwise)
    if not base.is_absolute():  # the XDG specification has relative ones ignored
        try:
            base = Path(otherwise).expanduser()
        except RuntimeError:  # no HOME, and a user id without a name
            return None
    return base / "vllm_mxfp4_sm120" if base.is_absolute() else None


def make_folder(folder: Path) -> None:
    """With all that it lies in, writable by this user alone whatever the umask is. Raises OSError."""
    for missing in reversed([folder, *folder.parents]):
        if not missing.exists():
            missing.mkdir(0o755, exist_ok=True)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a directory")


def others_may_write(folder: Path) -> str | None:
    """Who, besides this user and root, could have put a file there; None if nobody could. Raises OSError.

    In a folder with the sticky bit, as /tmp has it, nobody replaces what isn't his: another folder of ours may lie in
    it, records may not. Read-only mounts are an administrator's: Kubernetes mounts its ConfigMaps so, with mode 777.
    """
    real = folder.resolve()
    for each in (real, *real.parents):
        state = each.stat()
        sticky = each != real and state.st_mode & stat.S_ISVTX
        if (whose := owner_trouble(each, state, sticky=bool(sticky))) and not os.statvfs(each).f_flag & os.ST_RDONLY:
            return whose
    return None


def owner_trouble(path: Path, state: os.stat_result, sticky: bool = False) -> str | None:
    """Who, besides this user and root, could have written what has this `state`; None if nobody could."""
    if state.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to another user ({state.st_uid})"
    if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky:
        return f"others may write {path} (mode {stat.S_IMODE(state.st_mode):o})"
    return None
