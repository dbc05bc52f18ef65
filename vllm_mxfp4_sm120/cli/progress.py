# SPDX-License-Identifier: Apache-2.0
"""Progress of long work on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Show = Callable[[str, int, int], None]  # what is being done, how much is done, how much there is
SECONDS_BETWEEN_LINES = 10.0  # a log of an hour's work has a few hundred lines


@contextmanager
def progress(title: str, quiet: bool = False, unit: str = "GB") -> Iterator[Show]:
    """Gives what is to be called with each step; amounts are bytes where the unit is GB."""
    if quiet:
        yield lambda *_: None
    elif sys.stderr is not None and sys.stderr.isatty():
        yield from _bar(title, unit)
    else:
        yield _lines(title, unit)


def _bar(title: str, unit: str) -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn() if unit == "GB" else MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda what, done, total: bar.update(task, description=f"{title} {what}", completed=done, total=total)


def _lines(title: str, unit: str) -> Show:
    last = 0.0

    def show(what: str, done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            amounts = f"{done / 1e9:.2f} of {total / 1e9:.2f}" if unit == "GB" else f"{done} of {total}"
            print(f"{title} {what}: {amounts} {unit}", file=sys.stderr, flush=True)

    return show
