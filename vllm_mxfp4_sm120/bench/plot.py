# SPDX-License-Identifier: Apache-2.0
"""A picture of times over tokens, both axes logarithmic, with the limit; beside it the fraction of the limit reached.

The picture holds the numbers that it was drawn from, and the same numbers give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_mxfp4_sm120.bench.table import LIMIT, Table
from vllm_mxfp4_sm120.drafts import draft_of, expect_writable

FORMATS = (".png", ".svg")
OURS = "#0b6e4f"
# Colour, marker, width: this plugin's own stand out. docs/data has names as vLLM's users know them.
STYLES = {
    "native": (OURS, "o", 2.4),
    "native-int8": (OURS, "o", 2.4),
    "native-bf16": ("#57a98d", "o", 2.0),
    "vLLM Marlin": ("#b5532a", "s", 1.6),
    "vllm-marlin": ("#b5532a", "s", 1.6),
    "vLLM Triton": ("#3b5ba5", "^", 1.6),
    "vllm-triton": ("#3b5ba5", "^", 1.6),
}
OTHERS = (
    ("#7a4fa3", "D", 1.6),
    ("#c2912e", "v", 1.6),
    ("#4a8fa8", "P", 1.6),
    ("#8a5a44", "X", 1.6),
    ("#777777", "*", 1.6),
)
TIMES = (1, 2, 5)  # of each power of ten, where the axis of times has ticks


def why_not(path: Path) -> str | None:
    """One line saying why nothing can be drawn into this file; None if it can. Asked before anything is measured."""
    if path.suffix.lower() not in FORMATS:
        return f"--plot {path}: expected a file that ends in {' or '.join(FORMATS)}"
    if path.is_dir():
        return f"--plot {path}: a folder, expected a file's name"
    if not path.absolute().parent.is_dir():
        return f"--plot {path}: its folder doesn't exist"
    try:
        expect_writable(path.absolute().parent)
    except OSError as error:
        return f"--plot {path}: no file can be made there ({error.strerror or error})"
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "--plot needs matplotlib: pip install matplotlib"
    return None


def draw(tables: Sequence[Table], path: Path) -> None:
    """A row of the picture for each table, whole or not at all. Raises OSError."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    tables = [table for table in tables if table.rows and table.compared]
    wide = any(table.fractions(name) for table in tables for name in table.compared)
    # The same bytes every time: no date, and names of parts that don't depend on chance.
    with matplotlib.rc_context({"svg.hashsalt": "layer", "svg.fonttype": "path", "font.size": 10}):
        figure = Figure(figsize=(13.2 if wide else 7.2, 3.9 * max(1, len(tables))), layout="constrained")
        axes = figure.subplots(max(1, len(tables)), 2 if wide else 1, squeeze=False)
        for row, table in zip(axes, tables, strict=False):
            _times(row[0], table)
            if wide:
                _fractions(row[1], table)
        kind = path.suffix.lower().removeprefix(".")
        (FigureCanvasSVG if kind == "svg" else FigureCanvasAgg)(figure)
        numbers = json.dumps(tables[0].rows if len(tables) == 1 else [table.rows for table in tables])
        metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        with draft_of(path) as draft:
            figure.savefig(draft, format=kind, metadata={**metadata, "Description": numbers}, dpi=150)


def _times(axes: Any, table: Table) -> None:
    for name, (color, marker, width) in _styles(table).items():
        label = f"this plugin, {name}" if name == "native" else name
        tokens, times = zip(*table.pairs(name), strict=True)
        axes.plot(tokens, times, marker, ls="-", color=color, lw=width, label=label)
    for column, dashes in zip(
        [name for name in table.columns if name.startswith(LIMIT)], ("--", ":", "-."), strict=False
    ):
        axes.plot(*zip(*table.pairs(column), strict=True), ls=dashes, color="#222222", lw=1.2, label=column)
    _tokens(axes, table)
    axes.set_yscale("log")
    cells = [cell for row in table.rows for cell in row[1:] if cell]
    ticks = [first * 10**power for power in range(-1, 8) for first in TIMES]
    ticks = [tick for tick in ticks if min(cells) / 1.5 <= tick <= max(cells) * 1.5]
    axes.set_yticks(ticks, [f"{tick:g}" if tick < 1e5 else f"{tick:.0e}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylabel("microseconds")
    what = table.what.rpartition(",")[0]
    axes.set_title(f"{what}: lower is better\n{table.where}", fontsize=10, loc="left")
    axes.legend(frameon=False)


def _fractions(axes: Any, table: Table) -> None:
    for name, (color, marker, width) in _styles(table).items():
        if points := table.fractions(name):
            axes.plot(*zip(*points, strict=True), marker, ls="-", color=color, lw=width, label=name)
    axes.axhline(1.0, ls="--", color="#222222", lw=1.2)
    _tokens(axes, table)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("fraction of the limit")
    axes.set_title("Limit / time: 1 is as fast as reading the weights, or multiplying,\nat this machine's rates",
                   fontsize=10, loc="left")  # fmt: skip


def _tokens(axes: Any, table: Table) -> None:
    tokens = [row[0] for row in table.rows]
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(n) for n in tokens])
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _styles(table: Table) -> dict[str, tuple[str, str, float]]:
    """Of each candidate that has numbers."""
    others = iter(OTHERS * 4)
    return {name: STYLES.get(name) or next(others) for name in table.compared if any(table.pairs(name))}
