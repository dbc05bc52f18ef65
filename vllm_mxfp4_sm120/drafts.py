# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all, however their writing ends."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place at the end, and is removed if anything is raised.

    Everybody may read it, this user alone write it, whatever the umask is. Raises OSError.
    """
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
