# SPDX-License-Identifier: Apache-2.0
"""Every link within the repository resolves, to a file and to a heading of it."""

import re
from urllib.parse import unquote

import pytest

from tests.docs.pages import PAGES, ROOT, Page


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_resolves(page: Page) -> None:
    broken = []
    for link in page.links():
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (page.path.parent / name).resolve() if name else page.path
        if not target.exists() or not target.is_relative_to(ROOT) or (anchor and anchor not in Page(target).anchors()):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.path.name != "CHANGELOG.md"], ids=str)
def test_every_path_exists(page: Page) -> None:
    """Files and folders that running text names, from the repository's root, kernels/csrc or the package."""
    roots = (ROOT, ROOT / "kernels" / "csrc", ROOT / "vllm_mxfp4_sm120")
    folders = "|".join(path.name for root in roots for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    named = [span for span in page.spans() if re.fullmatch(rf"(?:{folders})/[\w./-]*", span)]
    assert [name for name in named if not any((root / name).exists() for root in roots)] == []


def test_the_links_are_found() -> None:
    """So that the test above can't pass because nothing was looked at."""
    readme = next(page for page in PAGES if str(page) == "README.md")
    assert {"docs/install.md", "docs/layer.svg", "LICENSE", "#what-was-checked-where"} <= set(readme.links())
    assert "what-was-checked-where" in readme.anchors()


def test_every_page_can_be_reached_from_the_readme() -> None:
    by_path = {page.path: page for page in PAGES}
    reached = {ROOT / "README.md"}
    queue = list(reached)
    while queue:
        page = by_path[queue.pop()]
        for link in page.links():
            target = (page.path.parent / link.partition("#")[0]).resolve()
            if target in by_path and target not in reached:
                reached.add(target)
                queue.append(target)
    assert [str(page) for page in PAGES if page.path not in reached] == []
