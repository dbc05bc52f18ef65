# SPDX-License-Identifier: Apache-2.0
"""What was measured, as data: a table for each layer, in the form that docs/data has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

LIMIT = "limit"
Cell = int | float | None  # None: it couldn't be measured


@dataclass
class Table:
    """One layer's times in microseconds: `columns` are tokens, limits, then candidates, `rows` as many cells each.

    `compared` are the candidates and `limits` the column that each of them can't beat. `errors` are relative, the
    largest of all rows; `left_out` says why a candidate, or some of its cells, isn't there.
    """

    what: str
    where: str
    command: str
    columns: list[str]
    compared: list[str]
    limits: dict[str, str] = field(default_factory=dict)
    best: str = "lowest"
    rows: list[list[Cell]] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, tokens: int, times: dict[str, float]) -> None:
        """A row: limits and times by column."""
        self.rows.append([tokens, *(_rounded(times.get(name)) for name in self.columns[1:])])

    def pairs(self, column: str) -> Iterator[tuple[int, float]]:
        """(tokens, microseconds) of a column, where it was measured."""
        index = self.columns.index(column)
        for row in self.rows:
            if row[0] is not None and (cell := row[index]) is not None:
                yield int(row[0]), cell

    def fractions(self, column: str) -> list[tuple[int, float]]:
        """(tokens, limit / time) of a candidate; empty where there is no limit to compare with."""
        limit = self.limits.get(column, LIMIT)
        if limit not in self.columns:
            return []
        limits = dict(self.pairs(limit))
        return [(tokens, limits[tokens] / time) for tokens, time in self.pairs(column) if tokens in limits]


def from_data(data: dict[str, object]) -> Table:
    """A file of docs/data, or a table of `bench --json`. Raises TypeError for a key that neither has."""
    columns = data["columns"]
    assert isinstance(columns, list)
    return Table(**{"compared": [name for name in columns[1:] if not name.startswith(LIMIT)], **data})  # type: ignore[arg-type]


def _rounded(time: float | None) -> float | None:
    """To the hundredth of a microsecond, from 1 ms on to the tenth: clocks give no more."""
    return time and round(time, 2 if time < 1000 else 1)
