# SPDX-License-Identifier: Apache-2.0
"""What is made by scripts is as the scripts make it now: tables, chart."""

import json
import re
import runpy
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, Page
from vllm_mxfp4_sm120.backends import registry

DOCS = runpy.run_path(str(ROOT / "scripts" / "docs.py"))
WITH_BLOCKS = [page for page in PAGES if DOCS["BLOCK"].search(page.text)]


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=str)
def test_tables_are_up_to_date(page: Page) -> None:
    """Of files it's their names that count; what each says of itself may have changed since."""

    def names(text: str) -> str:
        return re.sub(r"^(\| `[\w/]+\.\w+` \|).*", r"\1", text, flags=re.MULTILINE)

    assert names(page.text) == names(DOCS["filled"](page.text)), "run python scripts/docs.py"


def test_every_marker_and_every_file_of_data_is_used() -> None:
    used = [name for page in PAGES for name, _ in DOCS["BLOCK"].findall(page.text)]
    assert sorted(used) == sorted([*DOCS["FROM_CODE"], *(path.stem for path in DOCS["DATA"].glob("*.json"))])


def test_every_backend_has_its_row() -> None:
    rows = Page(ROOT / "docs" / "backends.md").first_cells()
    assert tuple(name for name in rows if name in registry.NAMES) == registry.NAMES


def test_the_best_of_a_row_is_bold() -> None:
    bold_best = DOCS["bold_best"]
    assert bold_best([1, 24.1, 60, 58], [1, 2, 3], "lowest") == [1, "**24.1**", 60, 58]
    assert bold_best(["a", "536, 551", "620 *"], [1, 2], "highest") == ["a", "536, 551", "**620 ***"]


def test_the_chart_shows_the_measured_numbers(tmp_path: Path) -> None:
    data = json.loads((ROOT / "docs" / "data" / "layer-20b.json").read_text())
    chart = runpy.run_path(str(ROOT / "scripts" / "chart.py"))
    chart["draw"](data, tmp_path / "layer.svg")
    for drawn in (tmp_path / "layer.svg", ROOT / "docs" / "layer.svg"):
        description = ElementTree.parse(drawn).find(".//{http://purl.org/dc/elements/1.1/}description")
        assert description is not None and json.loads(description.text or "") == data["rows"], drawn
    # As its curves stand, too: what text says can be changed without them.
    assert curves(tmp_path / "layer.svg") == curves(ROOT / "docs" / "layer.svg")


def curves(picture: Path) -> list[list[float]]:
    """The lines' points, to the tenth of a unit."""
    paths = ElementTree.parse(picture).findall(".//{http://www.w3.org/2000/svg}g/{http://www.w3.org/2000/svg}path")
    lines = [path.get("d", "").replace("M", "").replace("L", "").split() for path in paths]
    return [[round(float(number), 1) for number in line] for line in lines if len(line) == 2 * 7]
