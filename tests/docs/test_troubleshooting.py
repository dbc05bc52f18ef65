# SPDX-License-Identifier: Apache-2.0
"""docs/troubleshooting.md quotes messages that the code has, and leaves none out.

A message is an argument of `raise`, of a logger's warning or error, or what a function that returns `str | None` says.
An ellipsis stands for a value, in the code's messages (`{...}`, `%s`) as on the page.
"""

import ast
import re
from collections.abc import Iterator

from tests.docs.pages import ROOT, Page

PAGE = Page(ROOT / "docs" / "troubleshooting.md")
QUOTED = PAGE.first_cells()
SOURCES = [*(ROOT / "vllm_mxfp4_sm120").rglob("*.py"), ROOT / "kernels" / "setup.py"]
TOO_SHORT = 12  # letters: a message like "…: …" says nothing by itself
LEVELS = ("warning", "warning_once", "error", "warn")


def text_of(node: ast.AST | None) -> str:
    """A string with an ellipsis for every value in it; empty for what isn't a string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sd]", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (text_of(node.left) or "…") + (text_of(node.right) or "…")
    return ""


def messages(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and is_class(node.exc.func):
            yield from map(text_of, node.exc.args)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LEVELS:
            yield from map(text_of, node.args)
        elif isinstance(node, ast.FunctionDef) and node.returns and ast.unparse(node.returns) == "str | None":
            yield from (text_of(each.value) for each in ast.walk(node) if isinstance(each, ast.Return))


def is_class(callee: ast.expr) -> bool:
    """By its name: an exception, and not a function that makes one."""
    return ast.unparse(callee).rpartition(".")[2][0].isupper()


def strings(tree: ast.Module) -> Iterator[str]:
    yield from map(text_of, ast.walk(tree))


def letters(text: str) -> int:
    return len(re.findall(r"[A-Za-z]", text))


def same(quoted: str, message: str) -> bool:
    """Each may have an ellipsis where the other has words."""

    def matches(pattern: str, text: str) -> bool:
        return re.fullmatch(".*".join(map(re.escape, pattern.split("…"))), text, re.DOTALL) is not None

    return matches(quoted, message) or matches(message, quoted)


TREES = [ast.parse(path.read_text()) for path in SOURCES]
MESSAGES = sorted({text for tree in TREES for text in messages(tree) if letters(text) >= TOO_SHORT})
STRINGS = {text for tree in TREES for text in strings(tree) if letters(text) >= TOO_SHORT // 2}


def test_what_is_quoted_is_in_the_code() -> None:
    assert len(QUOTED) > 100
    assert [quoted for quoted in QUOTED if not any(same(quoted, text) for text in STRINGS)] == []


def test_every_message_is_explained() -> None:
    """What is listed here has no row in docs/troubleshooting.md."""
    assert len(MESSAGES) > 100
    assert [message for message in MESSAGES if not any(same(quoted, message) for quoted in QUOTED)] == []


def test_messages_are_found_in_every_form() -> None:
    tree = ast.parse(
        "def why(a) -> str | None:\n    return f'{a} is too old'\n"
        "def go(a):\n    logger.warning('%s is odd', a)\n    raise ValueError(f'{a} is ' + f'{a!r} wrong')\n"
    )
    assert sorted(filter(None, messages(tree))) == ["… is odd", "… is too old", "… is … wrong"]
    assert same("FOO=1 allows it", "…=1 allows it") and not same("FOO=1 allows that", "…=1 allows it")
