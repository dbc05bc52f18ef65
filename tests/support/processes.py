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


def wait_until(true: Callable[[], object], seconds: float) -> None:
    """Returns once `true()` is; AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
