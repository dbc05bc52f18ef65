# SPDX-License-Identifier: Apache-2.0
"""The kernels' source stays readable in pieces: no long function, no long file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "kernels" / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".cu", ".cuh", ".cpp", ".h"))
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Each function's name and how many lines it has, its template and return type included; lambdas are its own."""
    blank = re.sub(r'//.*|"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])\'', "", source)  # these may hold braces
    blank = re.sub(r"^#.*", "", blank, flags=re.MULTILINE)
    scopes: list[str | None] = []  # open braces: of functions their name, of namespaces and types ""; else None
    begin, head = 0, 0  # where a statement begins, and where the innermost function did
    for match in re.finditer(r"[{};]", blank):
        at, statement = match.start(), blank[begin : match.start()]
        if match[0] == "{":
            name = re.search(r"(\w+|operator\S+)\s*\((?![*])", re.sub(r"__\w+__\s*\([^()]*\)", "", statement))
            if not all(scope == "" for scope in scopes):
                scopes.append(None)
            elif re.search(r"\b(namespace|struct|class|enum|union|extern)\b", re.sub(r"<[^<>]*>", "", statement)):
                scopes.append("")
            elif name:
                scopes.append(name[1])
                head = begin + len(statement) - len(statement.lstrip())
            else:
                scopes.append(None)
        elif match[0] == "}":
            closed = scopes.pop()
            if closed:
                yield closed, blank.count("\n", head, at) + 1
        begin = at + 1
    assert not scopes, "braces don't match"


def test_what_is_a_function():
    source = """
namespace a {
enum class Kind { One, Two };
constexpr int TABLE[] = {1, 2};
template <typename T>
__global__ void __launch_bounds__(32 * T::N, 1) kernel(const Args args) {
  auto inner = [&](int i) { return i; };
  if (args.x) {  // }
    say("{");
  }
}
struct S {
  int x;
  S() : x(0) {}
  bool operator==(const S& other) const {
    return true;
  }
};
}
"""
    assert list(functions(source)) == [("kernel", 7), ("S", 1), ("operator==", 3)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_short_enough_to_read(path: Path):
    source = path.read_text()
    assert source.count("\n") <= MOST_LINES
    long = {name: lines for name, lines in functions(source) if lines > MOST_LINES_OF_A_FUNCTION}
    assert long == {}


def test_functions_are_found():
    found = {name for path in SOURCES for name, _ in functions(path.read_text())}
    assert {"decode_layer", "grouped_gemms", "group_slots", "main_loop", "moe_layer", "carve", "decode_word"} <= found
