# SPDX-License-Identifier: Apache-2.0
"""Draw docs/layer.svg from docs/data/layer-20b.json. Needs matplotlib.

    python scripts/chart.py [FILE]

The picture holds the numbers that it was drawn from, so that a test can tell when it is out of date.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parent.parent / "docs"
STYLES = {"native": ("#0b6e4f", "o", 2.4), "vLLM Marlin": ("#b5532a", "s", 1.6), "vLLM Triton": ("#3b5ba5", "^", 1.6)}


def draw(data: dict, path: Path) -> None:
    """One line a backend over the number of tokens, both axes logarithmic."""
    # The same bytes every time: no date, and names of parts that don't depend on chance.
    plt.rcParams.update({"svg.hashsalt": "layer", "svg.fonttype": "path", "font.size": 10})
    figure, axes = plt.subplots(figsize=(7.2, 3.9), layout="constrained")
    tokens = [row[0] for row in data["rows"]]
    for column, name in enumerate(data["columns"][1:], 1):
        color, marker, width = STYLES[name]
        label = "this plugin, native" if name == "native" else name
        axes.plot(tokens, [row[column] for row in data["rows"]], marker, ls="-", color=color, lw=width, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, [str(n) for n in tokens])
    axes.set_yticks([20, 50, 100, 200, 500, 1000, 2000, 5000], [20, 50, 100, 200, 500, 1000, 2000, 5000])
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.set_ylabel("microseconds")
    axes.set_title(f"{data['what'].rpartition(',')[0]}: lower is better\n{data['where']}", fontsize=10, loc="left")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    metadata = {"Date": None, "Creator": None, "Description": json.dumps(data["rows"])}
    figure.savefig(path, format="svg", metadata=metadata)
    plt.close(figure)


def main() -> None:
    data = json.loads((DOCS / "data" / "layer-20b.json").read_text())
    draw(data, Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "layer.svg")


if __name__ == "__main__":
    main()
