# SPDX-License-Identifier: Apache-2.0
"""The documentation, read by a Markdown parser: links, anchors, blocks of code, spans of code, tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
FOLDERS = ("configs", "docs", "examples", "models", "tests", "benchmarks", "kernels")


@dataclass(frozen=True)
class Page:
    path: Path

    def __str__(self) -> str:
        return str(self.path.relative_to(ROOT))

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def _tokens(self) -> list[Token]:
        return MarkdownIt("commonmark").enable("table").parse(self.text)

    def _inline(self) -> Iterator[Token]:
        for token in self._tokens:
            yield from token.children or ()

    def links(self) -> list[str]:
        found = [token.attrs.get("href") or token.attrs.get("src") for token in self._inline() if token.attrs]
        return [str(link) for link in found if link]

    def spans(self) -> list[str]:
        """Code within lines."""
        return [" ".join(token.content.split()) for token in self._inline() if token.type == "code_inline"]

    def blocks(self, language: str) -> list[str]:
        return [token.content for token in self._tokens if token.type == "fence" and token.info == language]

    def first_cells(self) -> list[str]:
        """Of each row of each table the first cell, if it is nothing but code."""
        cells = [after for row, after in zip(self._tokens, self._tokens[2:], strict=False) if row.type == "tr_open"]
        codes = [cell.children or [] for cell in cells]
        return [code[0].content for code in codes if [part.type for part in code] == ["code_inline"]]

    def anchors(self) -> set[str]:
        """As GitHub names headings."""
        seen: Counter[str] = Counter()
        anchors = set()
        for heading, inline in zip(self._tokens, self._tokens[1:], strict=False):
            if heading.type != "heading_open":
                continue
            text = "".join(part.content for part in inline.children or () if part.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            anchors.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
        return anchors


def pages() -> list[Page]:
    found = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
    return [Page(path) for path in sorted(found) if "build" not in path.parts]


PAGES = pages()
