# SPDX-License-Identifier: Apache-2.0
"""How the project hangs together: who imports whom, what imports nothing heavy, how long files and functions are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "vllm_mxfp4_sm120"
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / PACKAGE).rglob("*.py"))
}
# Of a checkout; an installation has none of them but the package.
FOLDERS = ("vllm_mxfp4_sm120", "benchmarks", "examples", "kernels", "models", "scripts", "tests")
MOST_LINES, MOST_FUNCTION_LINES = 400, 60


def imports(module: str, only_at_import: bool = False) -> set[str]:
    """The package's modules that this one imports, even inside of functions unless `only_at_import`.

    What's for type checkers alone doesn't count, nor does a package as the parent of what is imported.
    """
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(SOURCES[module].read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        if only_at_import and isinstance(node, ast.FunctionDef):
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{module}: relative imports are not used here"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in SOURCES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        waiting += ast.iter_child_nodes(node)
    return found & SOURCES.keys() - {module}


@pytest.mark.parametrize("only_at_import", [True, False])
def test_no_import_cycle(only_at_import: bool) -> None:
    graph = {module: imports(module, only_at_import) for module in SOURCES}
    assert sum(map(len, graph.values())) > 100  # it does see imports
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("module", ["mxfp4", "terms", "moe", "routing", "platform", "log", "backends.registry"])
def test_mathematics_and_facts_read_no_environment(module: str) -> None:
    text = SOURCES[f"{PACKAGE}.{module}"].read_text()
    assert "environ" not in text and "getenv" not in text
    assert f"{PACKAGE}.settings" not in imports(f"{PACKAGE}.{module}")


def test_only_the_packages_own_logger() -> None:
    made = [module for module, path in SOURCES.items() if "getLogger(" in path.read_text()]
    assert made == [f"{PACKAGE}.log"]


def test_settings_and_registry_import_nothing_heavy() -> None:
    code = (
        f"import sys, {PACKAGE}.settings; print(sorted({{'torch', 'triton', 'vllm', 'pydantic'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def reached(module: str) -> set[str]:
    """All of the package that a module may import, in functions too, by way of others."""
    found, waiting = set(), [module]
    while waiting:
        found.add(here := waiting.pop())
        waiting += imports(here) - found
    return found


def test_nothing_that_serves_imports_the_tools() -> None:
    """Neither commands nor benchmarks, nor what only they need."""
    starts = [module for module in SOURCES if module.split(".")[1:2] in (["plugin"], ["quantization"], ["backends"])]
    serving = set().union(*map(reached, starts))
    assert len(serving) > 40
    assert [module for module in serving if {"bench", "cli", "packing", "tune"} & set(module.split("."))] == []
    tools = re.compile(r"^\s*(?:import|from) (?:rich|matplotlib)\b", re.MULTILINE)
    assert [module for module in serving if tools.search(SOURCES[module].read_text())] == []
    assert f"{PACKAGE}.bench.measure" in reached(f"{PACKAGE}.cli.bench")


def lengths(text: str) -> Iterator[tuple[str, int]]:
    """Each function's name and its lines, decorators included."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            yield node.name, node.end_lineno - min([node.lineno, *(each.lineno for each in node.decorator_list)]) + 1


def test_no_file_and_no_function_is_too_long() -> None:
    files = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    assert len(files) > 100
    long = []
    for path in files:
        text, name = path.read_text(), path.relative_to(ROOT)
        if text.count("\n") > MOST_LINES:
            long.append(f"{name}: {text.count(chr(10))} lines")
        long += [f"{name}: {function} has {n} lines" for function, n in lengths(text) if n > MOST_FUNCTION_LINES]
    assert long == []


def test_a_long_function_is_noticed() -> None:
    assert dict(lengths("@a\n@b\ndef f():\n" + "    x\n" * 58)) == {"f": 61}
