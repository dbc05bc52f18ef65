# SPDX-License-Identifier: Apache-2.0
"""Draw docs/layer.svg from docs/data/layer-20b.json, as `mxfp4-sm120 bench --plot` draws. Needs matplotlib.

python scripts/chart.py [FILE]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vllm_mxfp4_sm120.bench import plot, table  # noqa: E402

DOCS = ROOT / "docs"


def draw(data: dict, path: Path) -> None:
    """A file of docs/data as a picture."""
    plot.draw([table.from_data(data)], path)


def main() -> None:
    data = json.loads((DOCS / "data" / "layer-20b.json").read_text())
    draw(data, Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "layer.svg")


if __name__ == "__main__":
    main()
