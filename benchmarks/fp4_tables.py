# SPDX-License-Identifier: Apache-2.0
"""A table of a study, for people and in the form of docs/data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Table:
    """`command` makes it again; `where` says on what it was computed or measured."""

    what: str
    where: str
    command: str
    columns: list[str]
    rows: Sequence[Sequence[object]]

    def show(self, title: str) -> None:
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable(*self.columns, title=title)
        for row in self.rows:
            table.add_row(*(str(cell).replace("**", "") for cell in row))
        Console().print(table)

    def write(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"fp4-{name}.json").write_text(json.dumps(asdict(self), indent=1) + "\n")
