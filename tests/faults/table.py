# SPDX-License-Identifier: Apache-2.0
"""A row of the tables of faults: what is done to a sound checkpoint, and what must come of it.

Rows of one subject stand in one file beside this one, each with the test that goes through them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

SERVED = "served"  # with the answers of the sound checkpoint


@dataclass(frozen=True)
class Row:
    """One fault, or a neighbour of one that must be served.

    `damage` changes a checkpoint's folder, a copy that is the row's own. `expected` is SERVED or a part of the one line
    that refuses it. `overrides` go before config.json (`--hf-overrides`). `engine` are arguments of a real engine, None
    for a row that needs none.
    """

    name: str
    damage: Callable[[Path], object]
    expected: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    engine: Mapping[str, Any] | None = None

    def check(self, read: Callable[[], Mapping[str, Tensor]], sound: Mapping[str, Tensor]) -> None:
        """That `read` raises the expected line, or returns the tensors of the sound checkpoint."""
        if self.expected != SERVED:
            with pytest.raises(ValueError) as error:
                read()
            assert self.expected in one_line(error.value)
            return
        got = read()
        assert got.keys() == sound.keys()
        for name, tensor in got.items():
            assert torch.equal(tensor, sound[name]), name


def parametrize(rows: Sequence[Row]) -> pytest.MarkDecorator:
    """A test for each row, named after it."""
    assert len({row.name for row in rows}) == len(rows), "two rows have the same name"
    return pytest.mark.parametrize("row", rows, ids=[row.name.replace(" ", "-") for row in rows])


def one_line(error: BaseException) -> str:
    """What the error says, which must be one line of a length that fits a log."""
    text = str(error)
    assert text.isprintable() and len(text) < 2500, text
    return text
