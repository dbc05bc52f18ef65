# SPDX-License-Identifier: Apache-2.0
"""Workflows and hooks name what exists. Whether GitHub would run them isn't tried here."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yaml"))
STEPS = [
    pytest.param(step, id=f"{workflow.stem}-{name}-{number}")
    for workflow in WORKFLOWS
    for name, job in yaml.safe_load(workflow.read_text())["jobs"].items()
    for number, step in enumerate(job["steps"])
]


def test_what_there_is_a_workflow_for():
    jobs = {
        name: set(yaml.safe_load((ROOT / ".github/workflows" / name).read_text())["jobs"])
        for name in ("test.yaml", "wheels.yaml")
    }
    assert jobs == {"test.yaml": {"lint", "unit", "kernels"}, "wheels.yaml": {"wheel"}}
    # YAML reads the key `on` as true.
    assert yaml.safe_load((ROOT / ".github/workflows/wheels.yaml").read_text())[True]["push"] == {"tags": ["v*"]}


@pytest.mark.parametrize("step", STEPS)
def test_each_step_names_what_exists(step: dict):
    if "uses" in step:
        assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])
        return
    command = re.sub(r"\$\{\{.*?\}\}", "x", step["run"])
    assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0
    for target in re.findall(r"\bmake (\w+)", command):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for path in re.findall(r"(?:scripts|tests|kernels)/[\w./]+", command):
        assert (ROOT / path).exists(), path
    for extra in re.findall(r'"\.\[([\w,]+)\]"', command):
        declared = (ROOT / "pyproject.toml").read_text()
        assert all(re.search(rf"^{name} = \[", declared, re.MULTILINE) for name in extra.split(","))


def test_hooks_are_those_of_make_lint():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    programs = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in hooks}
    lint = re.search(r"^lint:.*?(?=^\S)", (ROOT / "Makefile").read_text(), re.MULTILINE | re.DOTALL)
    assert lint is not None
    assert programs == set(re.findall(r"@\$\(VENV\)/bin/([\w-]+)", lint[0])) == {"ruff", "clang-format", "mypy"}
    assert all((Path(sys.executable).parent / program).exists() for program in programs)


def test_every_place_of_slow_tests_exists():
    places = runpy.run_path(str(ROOT / "conftest.py"))["SLOW"]
    for path, _, test in (place.partition("::") for place in places):
        assert (ROOT / path).exists() and f"def {test}" in ((ROOT / path).read_text() if test else "def "), path
