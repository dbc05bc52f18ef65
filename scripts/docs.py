# SPDX-License-Identifier: Apache-2.0
"""Fill in what documentation takes from data and from code: the tables between the markers `<!-- NAME -->`.

    python scripts/docs.py          # rewrite what has changed
    python scripts/docs.py --check  # exit status 1 if anything would change

A marker names a file of docs/data (`<!-- layer-20b -->`), or a function below (`<!-- settings -->`); the table ends
at `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vllm_mxfp4_sm120 import settings as all_settings  # noqa: E402
from vllm_mxfp4_sm120.backends import registry  # noqa: E402

DATA = ROOT / "docs" / "data"
KERNELS = ROOT / "kernels" / "csrc"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"<!-- ([\w-]+) -->\n(.*?)<!-- end -->", re.DOTALL)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def measured(name: str) -> str:
    """The table of docs/data/NAME.json, the best of each row in bold, and how it was measured."""
    data = json.loads((DATA / f"{name}.json").read_text())
    header: list[str] = data["columns"]
    compared = [header.index(column) for column in data.get("compared", header[1:])]
    best = data.get("best")
    directions = best if isinstance(best, list) else [best] * len(data["rows"])
    rows = [bold_best(row, compared, direction) for row, direction in zip(data["rows"], directions, strict=True)]
    return (
        f"*{data['what']}. {data['where'][0].upper()}{data['where'][1:]}:* `{data['command']}`\n\n{table(header, rows)}"
    )


def bold_best(row: list[Any], compared: Sequence[int], best: str | None) -> list[Any]:
    """`best` is "lowest", "highest", or None where nothing is compared. Of "536, 551" the first number counts."""
    if best is None:
        return row
    numbers = {column: float(re.match(r"[\d.]+", str(row[column]))[0]) for column in compared}  # type: ignore[index]
    winner = (min if best == "lowest" else max)(numbers.values())
    return [f"**{cell}**" if numbers.get(column) == winner else cell for column, cell in enumerate(row)]


def settings() -> str:
    """Every setting, from the table that the code reads."""

    def shown(default: object) -> object:
        return "" if default is None else int(default) if isinstance(default, bool) else default

    rows = [
        (
            f"`{each.name}`",
            shown(each.default),
            each.kind.accepted,
            each.meaning,
            f"`{each.key}`" if each.in_json else "",
        )
        for each in all_settings.TABLE
    ]
    return table(("variable", "default", "accepted", "meaning", "in `--additional-config`"), rows)


def cards() -> str:
    """In which order backends are tried, by family of cards, from the registry."""
    families = {
        "SM 12.x (RTX 50, RTX PRO 6000 Blackwell, GB10)": 120,
        "SM 10.x (B200, B300)": 100,
        "SM 9.0 (H100, H200)": 90,
        "SM 8.x (A100, L40S, RTX 30, RTX 40)": 80,
        "CPU": 0,
    }
    rows = [(card, ", ".join(f"`{name}`" for name in registry.automatic(family))) for card, family in families.items()]
    return table(("card", "in this order"), rows)


def refusals() -> str:
    """What an engine may ask for and can't have, in the words that a user sees."""
    from vllm_mxfp4_sm120.quantization import features

    marked = (re.sub("--[a-z0-9-]+", r"`\g<0>`", feature.refusal) for feature in features.FEATURES)
    return "".join(f"- {refusal}\n" for refusal in marked)


def modules() -> str:
    """The package's modules, by what each says of itself first."""
    files = [path for path in sorted((ROOT / "vllm_mxfp4_sm120").rglob("*.py")) if path.stat().st_size > 0]
    return files_table("module", files, lambda text: ast.get_docstring(ast.parse(text)) or "")


def sources() -> str:
    """The kernels' files, likewise: the comment that follows the licence."""

    def comment(text: str) -> str:
        lines = itertools.takewhile(lambda line: line.startswith("//"), text.splitlines()[1:])
        return "\n".join(line[2:].strip() for line in lines)

    return files_table("file", [path for path in sorted(KERNELS.rglob("*.*")) if comment(path.read_text())], comment)


def files_table(what: str, files: Sequence[Path], description: Callable[[str], str]) -> str:
    """A row for each file: its path and the first sentence of its description."""
    base = files[0].parent
    rows = [(f"`{path.relative_to(base)}`", first_sentence(description(path.read_text()))) for path in files]
    return table((what, "what it holds"), rows)


def first_sentence(text: str) -> str:
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return (re.match(r".*?\.(?= [A-Z]|$)", paragraph) or [paragraph])[0].rstrip(",.")


def rule() -> str:
    """Which kernel computes a call, on cards without a file of their own."""
    lines = json.loads((ROOT / "configs" / "tuning" / "default.json").read_text())["rule"]
    rows = [(f"`{line['kernel']}`", line.get("tokens", ""), line.get("tokens_per_expert", "")) for line in lines]
    return table(("kernel", "for up to so many tokens", "and so many per expert, on average"), rows)


def configurations() -> str:
    """The grouped kernel's shapes."""
    text = (KERNELS / "grouped" / "layer.cuh").read_text()
    listed = re.search(r"CONFIGS\[\] = \{(.*?)\};", text, re.DOTALL)[1]  # type: ignore[index]
    rows = [
        (f"`tokens{tokens}`", tokens, warps, stages, blocks)
        for warps, tokens, stages, blocks in re.findall(r"\{(\d+), (\d+), (\d+), (\d+)\}", listed)
    ]
    return table(("shape", "tokens of a block", "warps", "stages of the ring", "blocks per multiprocessor"), rows)


FROM_CODE: dict[str, Callable[[], str]] = {
    "settings": settings,
    "cards": cards,
    "refusals": refusals,
    "modules": modules,
    "sources": sources,
    "rule": rule,
    "configurations": configurations,
}


def filled(text: str) -> str:
    """A page with every block as it should be. Raises FileNotFoundError for a marker that names nothing."""

    def block(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name} -->\n{(FROM_CODE.get(name) or (lambda: measured(name)))()}<!-- end -->"

    return BLOCK.sub(block, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    stale = {page: filled(page.read_text()) for page in PAGES}
    stale = {page: text for page, text in stale.items() if text != page.read_text()}
    for page, text in stale.items():
        print(f"{page.relative_to(ROOT)}: {'is out of date, run python scripts/docs.py' if check else 'rewritten'}")
        if not check:
            page.write_text(text)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
