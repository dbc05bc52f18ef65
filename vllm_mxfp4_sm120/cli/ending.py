# SPDX-License-Identifier: Apache-2.0
"""How every command ends: its report on stdout, what went wrong as one line on stderr, and the exit status."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

WRONG_ARGUMENTS = 2
STOPPED, NOBODY_READS = 128 + signal.SIGINT, 128 + signal.SIGPIPE  # as shells count


class WrongArguments(ValueError):
    """What was asked for makes no sense, whatever lies on this machine."""


@dataclass(frozen=True)
class Outcome:
    """What a command has to say: `lines` to people, or `data` as JSON. Lines are made as they are printed."""

    lines: Iterable[str] = ()
    data: object = None
    status: int = 0

    def tell(self, as_json: bool) -> int:
        """Print it; returns the status. Raises OSError."""
        text = json.dumps(self.data, indent=2) if as_json else "\n".join(self.lines)
        try:
            if text:
                print(text, flush=True)
        except BrokenPipeError:
            raise
        except OSError as error:
            settle()
            raise OSError(f"the report can't be printed: {error.strerror or error}") from error
        return self.status


def failed(command: str, why: str, as_json: bool, status: int = 1) -> int:
    """Say why on stderr, to programs also on stdout; returns the status."""
    why = " ".join(why.splitlines())
    print(f"{' '.join(['mxfp4-sm120', command]).strip()}: {why}", file=sys.stderr)
    if as_json:
        with suppress(OSError):  # where stdout is what failed
            Outcome(data={"error": why}).tell(True)
    return status


def in_words(error: BaseException) -> str:
    """What went wrong, as people say it."""
    if isinstance(error, ModuleNotFoundError):
        return f"Python's module {error.name} is missing here: install vLLM, which brings it"
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return f"{where}{error.strerror}"
    return str(error) or ("not enough memory" if isinstance(error, MemoryError) else type(error).__name__)


def settle() -> None:
    """Flush both streams. What can't be written goes nowhere, or Python would complain of it once more at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def unwind_on_signals() -> None:
    """SIGTERM and SIGHUP unwind the program as Ctrl-C does, so that nothing is left behind; the status stays theirs."""

    def unwind(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, unwind)
