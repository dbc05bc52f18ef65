# SPDX-License-Identifier: Apache-2.0
"""Child processes that end with their parent, however that ends: an exception, a signal, SIGKILL.

`tied` starts one. It runs this file by its path, which becomes the command once it's tied; so nothing but the standard
library is imported here.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h


@contextmanager
def tied(command: Sequence[str], grace: float = 0, **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """The command in a session of its own, `options` being Popen's; at the end it's stopped with all that it started.

    With `grace`, it's sent a signal first (`gentle`), and has so many seconds to end by itself. Raises OSError if it
    can't start.
    """
    parent_lives, hold = os.pipe()  # nobody writes: reading ends when `hold` is closed, by hand or by the kernel
    child = None
    try:
        tie = [sys.executable, __file__, str(os.getpid()), str(parent_lives), str(grace)]
        child = subprocess.Popen([*tie, *command], start_new_session=True, pass_fds=(parent_lives,), **options)
        os.close(parent_lives)
        parent_lives = -1
        yield child
    finally:
        try:
            if child is not None:
                _stop(child, grace)
        finally:
            os.close(hold)
            if parent_lives >= 0:
                os.close(parent_lives)


def gentle() -> signal.Signals:
    """SIGINT, as Ctrl-C sends it; SIGTERM where that is ignored (behind `&` in a script), which children inherit."""
    return signal.SIGTERM if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else signal.SIGINT


def _stop(child: subprocess.Popen[Any], grace: float) -> None:
    try:
        if grace and child.poll() is None:
            child.send_signal(gentle())
            with suppress(subprocess.TimeoutExpired):
                child.wait(grace)
    finally:  # a second signal ends the patience
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # stuck in a driver, not even SIGKILL ends it: leave it behind
            child.wait(5)
        for pipe in (child.stdout, child.stderr):
            if pipe is not None:
                pipe.close()


def main(parent: int, parent_lives: int, grace: float, *command: str) -> None:
    """Tie this process to its parent, then become the command."""
    if sys.platform == "linux":  # at once, even where it hangs in a driver's call
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, gentle() if grace else signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(1)
    me = os.getpid()
    if os.fork() == 0:
        # What the command starts, the kernel leaves running: this process of the same group ends it.
        for stream in (0, 1, 2):
            os.close(stream)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        os.read(parent_lives, 1)
        end = time.monotonic() + grace
        while os.getppid() == me and time.monotonic() < end:
            time.sleep(0.1)
        os.killpg(0, signal.SIGKILL)
    os.close(parent_lives)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:])
