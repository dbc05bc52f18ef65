# SPDX-License-Identifier: Apache-2.0
"""README and docs say what the code does, where that can be checked."""

import re
from pathlib import Path

import pytest

from vllm_mxfp4_sm120 import settings

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


@pytest.mark.parametrize("setting", settings.TABLE, ids=lambda setting: setting.name)
def test_every_variable_has_its_row(setting: settings.Setting) -> None:
    default = setting.default
    if isinstance(default, bool):
        default = int(default)
    default = "" if default is None else default
    assert f"| `{setting.name}` | {default} | {setting.meaning} |\n" in (ROOT / "docs/settings.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_within_the_repository_resolves(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)#?[^)\s]*\)", page.read_text())
    assert [link for link in links if link and not (page.parent / link).exists()] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
