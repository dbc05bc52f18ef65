# SPDX-License-Identifier: Apache-2.0
"""Every command that the documentation shows is one that its program accepts.

In blocks of shell every line counts, in running text every span of code that begins with one of the programs below.
Nothing is served, installed or built: a command is read by the parser that would read it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable, Sequence
from functools import cache

import pytest
from packaging.requirements import Requirement

from tests.docs.pages import PAGES, ROOT, Page
from vllm_mxfp4_sm120.cli.__main__ import COMMANDS

PYTHON_BLOCKS = [(page, block) for page in PAGES for block in page.blocks("python")]


def commands(page: Page) -> list[list[str]]:
    """Each command's words."""
    lines = [line for block in page.blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    messages = page.first_cells() if page.path.name == "troubleshooting.md" else []
    spans = [span for span in page.spans() if "…" not in span and span not in messages]
    named = [words_of(span) for span in spans if span.count("'") % 2 == 0 and span.count('"') % 2 == 0]
    shown = [words_of(line) for line in lines]
    shown += [words for words in named if words[:1] and words[0] in CHECKS and len(words) > 1]
    return [words for words in shown if words]


def words_of(line: str) -> list[str]:
    """Without comments, and without variables that are set in front."""
    words = shlex.split(line, comments=True)
    return list(itertools.dropwhile(lambda word: re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", word), words))


def make(arguments: Sequence[str], config: pytest.Config) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    for word in arguments:
        name, is_variable, value = word.partition("=")
        assert f"$({name})" in makefile if is_variable else word in targets, word
        if name == "ARGS" and "test" in arguments:
            pytest_options(shlex.split(value), config)


def pip(arguments: Sequence[str], config: pytest.Config) -> None:
    """What is installed is this project, what it needs, or what vLLM brings."""
    assert arguments[0] in ("install", "uninstall", "wheel")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    known = {Requirement(text) for texts in (project["dependencies"], *extras.values()) for text in texts}
    names = {requirement.name for requirement in known} | {"pre-commit", "oss-harmony", "openai-harmony"}
    for word in arguments[1:]:
        if word in ("--no-deps", "--force-reinstall", "-y"):
            continue
        if match := re.fullmatch(r"\.(?:\[(\w+)\])?", word):
            assert match[1] is None or match[1] in extras, word
        else:
            asked = Requirement(word)
            assert asked in known or (not asked.specifier and asked.name in names), word


def pytest_options(arguments: Sequence[str], config: pytest.Config) -> None:
    parsed, unknown = config._parser.parse_known_and_unknown_args(list(arguments))
    assert unknown == [], unknown
    for place in parsed.file_or_dir:
        assert (ROOT / place).exists(), place


def our_command(arguments: Sequence[str], config: pytest.Config) -> None:
    command, *rest = arguments
    assert command in (*COMMANDS, "COMMAND", "--version"), command
    if not rest or command == "COMMAND":  # its name in running text, or --version
        return
    here = rest.index("--") if "--" in rest else len(rest)
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(f"vllm_mxfp4_sm120.cli.{command.replace('-', '_')}").add_arguments(parser)
    parser.parse_args([word for word in rest[:here] if word != "--help"])
    if here < len(rest):
        vllm(["serve", rest[0], *rest[here + 1 :]], config)


@cache
def vllm_parser(bench: bool) -> argparse.ArgumentParser:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    if bench:
        from vllm.benchmarks.serve import add_cli_args

        add_cli_args(parser)
    else:
        from vllm.entrypoints.cli.serve import ServeSubcommand

        ServeSubcommand().subparser_init(parser.add_subparsers(required=True))
    return parser


def vllm(arguments: Sequence[str], config: pytest.Config) -> None:
    bench = list(arguments[:2]) == ["bench", "serve"]
    vllm_parser(bench).parse_args(list(arguments[2 if bench else 0 :]))


def python(arguments: Sequence[str], config: pytest.Config) -> None:
    """A script of the repository: its own --help has every option that is shown."""
    if arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]) is not None
        return
    if arguments[0] == "-c":
        imported = [node for node in ast.walk(ast.parse(arguments[1])) if isinstance(node, ast.Import)]
        assert all(importlib.util.find_spec(name.name) for node in imported for name in node.names)
        return
    options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    assert options <= options_of(arguments[0]), arguments


@cache
def options_of(script: str) -> set[str]:
    """What --help lists; nothing for a script that takes no options."""
    text = (ROOT / script).read_text()
    ast.parse(text)
    if "add_argument" not in text:
        return set()
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", [script, "--help"])
        patch.syspath_prepend((ROOT / script).parent)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not ended.value.code
    return set(re.findall(r"--[\w-]+", said.getvalue()))


def curl(arguments: Sequence[str], config: pytest.Config) -> None:
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    assert arguments[0].endswith("/v1/completions")
    body = json.loads(arguments[arguments.index("-d") + 1])
    assert set(body) <= set(CompletionRequest.model_fields)
    CompletionRequest(**body)


def docker(arguments: Sequence[str], config: pytest.Config) -> None:
    """Can't be run here: the file is there, and what follows the image is a `vllm serve` command."""
    if arguments[0] == "build":
        assert (ROOT / arguments[arguments.index("-f") + 1]).is_file() and (ROOT / arguments[-1]).is_dir()
    else:
        assert arguments[0] == "run"
        vllm(["serve", *arguments[arguments.index("vllm-mxfp4-sm120") + 1 :]], config)


def script(arguments: Sequence[str], config: pytest.Config) -> None:
    usage = (ROOT / "kernels" / "build.sh").read_text()
    assert all(word in usage for word in arguments if word.startswith("-"))


def pre_commit(arguments: Sequence[str], config: pytest.Config) -> None:
    assert list(arguments) == ["install"] and (ROOT / ".pre-commit-config.yaml").exists()


def export(arguments: Sequence[str], config: pytest.Config) -> None:
    assert all(re.fullmatch(r"[A-Z][A-Z0-9_]*=\S+", word) for word in arguments)


CHECKS: dict[str, Callable[[Sequence[str], pytest.Config], None]] = {
    "export": export,
    "make": make,
    "pip": pip,
    "pytest": pytest_options,
    "mxfp4-sm120": our_command,
    "vllm": vllm,
    "python": python,
    "curl": curl,
    "docker": docker,
    "kernels/build.sh": script,
    "pre-commit": pre_commit,
}


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=str)
def test_every_command_is_accepted(page: Page, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for program, *arguments in commands(page):
        try:
            CHECKS[program](arguments, request.config)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{page}: {shlex.join([program, *arguments])}: {type(error).__name__}: {error}")


@cache
def known_flags() -> set[str]:
    """Every option of vllm serve, vllm bench serve, this package's commands, pytest, and the scripts."""
    flags = set(vllm_parser(bench=False)._subparsers._group_actions[0].choices["serve"]._option_string_actions)
    flags |= set(vllm_parser(bench=True)._option_string_actions)
    for command in COMMANDS:
        parser = argparse.ArgumentParser()
        importlib.import_module(f"vllm_mxfp4_sm120.cli.{command.replace('-', '_')}").add_arguments(parser)
        flags |= set(parser._option_string_actions)
    scripts = ("benchmarks/engine.py", "benchmarks/load.py", "benchmarks/quality.py")
    return flags.union(*map(options_of, scripts), {"--no-deps", "--replay", "--conformance-cases"})


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_flag_exists(page: Page) -> None:
    """Flags that stand alone in running text, `--like this`."""
    messages = page.first_cells() if page.path.name == "troubleshooting.md" else []
    spans = [span for span in page.spans() if span not in messages and "*" not in span]
    flags = {match[0] for span in spans if (match := re.match(r"--[a-z][\w-]*", span))}
    assert flags <= known_flags()


@pytest.mark.parametrize("page, block", PYTHON_BLOCKS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(PYTHON_BLOCKS)])
def test_python_is_python(page: Page, block: str) -> None:
    """It compiles and its imports exist. What needs no model is run, with its assertions."""
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, name.name) for name in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "LLM":
            from vllm.engine.arg_utils import EngineArgs

            assert {keyword.arg for keyword in node.keywords} <= set(inspect.signature(EngineArgs).parameters)
    if "assert" in block:
        exec(compile(tree, str(page), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(
    "program, arguments",
    [
        ("make", "sevre"),
        ("make", "test ARGS='tests/no_such_folder'"),
        ("pip", "install '.[no_such_extra]'"),
        ("pip", "install 'vllm>=0.31'"),
        ("pytest", "tests/unit --no-such-option"),
        ("mxfp4-sm120", "docter"),
        ("mxfp4-sm120", "doctor --jsn"),
        ("mxfp4-sm120", "serve DIR -- --no-such-option"),
        ("vllm", "serve DIR --no-such-option"),
        ("mxfp4-sm120", "bench --no-such-option"),
        ("python", "benchmarks/engine.py --no-such-option"),
        ("python", "benchmarks/no_such_file.py"),
        ("curl", """http://127.0.0.1:8000/v1/completions -d '{"promt": ""}'"""),
        ("kernels/build.sh", "--no-such-option"),
    ],
)
def test_a_wrong_command_would_be_noticed(
    program: str, arguments: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((Exception, SystemExit)):
        CHECKS[program](shlex.split(arguments), request.config)
