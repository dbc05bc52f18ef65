# SPDX-License-Identifier: Apache-2.0
"""What tests ask of this machine's processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def processes(mark: str) -> list[int]:
    """Ids of processes whose environment has this mark."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_until(true: Callable[[], object]) -> None:
    """Returns once `true()` is; AssertionError after a minute, which is for machines with much else to do."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
