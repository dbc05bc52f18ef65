# SPDX-License-Identifier: Apache-2.0
"""SHA256SUMS, the manifest of a checkpoint's folder, in the format of the program `sha256sum`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path

SUMS = "SHA256SUMS"
Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\0]+)")


def sha256(file: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_sums(directory: Path, known: Mapping[str, str], leave_out: str = "") -> None:
    """List every file of the folder but one; those in `known` were summed when they were written."""
    names = sorted(file.name for file in directory.iterdir() if file.is_file() and file.name not in (SUMS, leave_out))
    lines = [f"{known.get(name) or sha256(directory / name)}  {name}\n" for name in names]
    (directory / SUMS).write_text("".join(lines), encoding="utf-8", errors="surrogateescape")


def verify(directory: Path, progress: Progress = lambda *_: None) -> list[str]:
    """What is wrong with the folder's files, one line each; nothing, if all are as their manifest says.

    Raises ValueError if there is no manifest, or if it can't be read or is empty.
    """
    path = directory / SUMS
    if not path.is_file():
        raise ValueError(f"{path}: no such file, expected the manifest that `mxfp4-sm120 pack` writes")
    wrong: list[str] = []
    sums: dict[Path, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="surrogateescape").splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{path}: line {number} is {line[:80]!r}, expected a SHA-256 and a file's name")
        sums[directory / match[2]] = match[1]
    if not sums:
        raise ValueError(f"{path}: lists no files, expected all that `mxfp4-sm120 pack` wrote")
    sizes = {file: file.stat().st_size for file in sums if file.is_file()}
    done, total = 0, sum(sizes.values())
    for file, expected in sums.items():
        progress(file.name, done, total)
        done += sizes.get(file, 0)
        if file not in sizes:
            wrong.append(f"{file}: no such file, expected what {SUMS} lists; fetch it again")
        elif (found := sha256(file)) != expected:
            wrong.append(f"{file}: its SHA-256 is {found}, expected {expected}; fetch it again")
    progress("done", done, total)
    return wrong
