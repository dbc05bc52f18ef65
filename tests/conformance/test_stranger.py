# SPDX-License-Identifier: Apache-2.0
"""A new backend is one file and one entry in the registry: nothing else has to know of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_mxfp4_sm120.backends import registry

ROOT = Path(__file__).parents[2]
ENTRY = '    Entry("stranger", "stranger:Stranger", EVERYWHERE),\n'

# Run in the copy; what it finds out comes as JSON in the last line.
SCRIPT = """
import json
from tests.conformance import suite
from vllm_mxfp4_sm120 import selector, settings
from vllm_mxfp4_sm120.cli import doctor
from vllm_mxfp4_sm120.moe import MoEShape

choice = selector.select(selector.this_machine(), MoEShape(8, 8, 64, 96, 2))
report = doctor.examine(prove=False)
print(json.dumps({
    "chosen": [choice.backend.name, len(choice.rejected), report.chosen["gpt-oss-20b"]],
    "listed": [each.name for each in report.backends if each.automatic and each.why_not is None],
    "accepted": settings.BACKEND.kind.parse("stranger"),
    "wrong": suite.main(["stranger", "--cases", "25"]),
}))
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package, what it reads and the suite, with the new file and the new line."""
    for name in ("vllm_mxfp4_sm120", "configs", "tests/conformance", "tests/support"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "tests/__init__.py", tmp_path / "tests")
    backends = tmp_path / "vllm_mxfp4_sm120/backends"
    shutil.copy(Path(__file__).with_name("stranger.py"), backends)
    text = (backends / "registry.py").read_text()
    before = '    Entry("tiled",'
    assert text.count(before) == 1
    (backends / "registry.py").write_text(text.replace(before, ENTRY + before))
    return tmp_path


def test_one_file_and_one_entry(copy: Path, tmp_path: Path) -> None:
    """Chosen by "auto" after a proof in a process of its own, listed by doctor, right in the conformance suite."""
    assert "stranger" not in registry.NAMES
    env = {name: value for name, value in os.environ.items() if not name.startswith("MXFP4_SM120_")}
    env |= {"PYTHONPATH": str(copy), "CUDA_VISIBLE_DEVICES": "", "MXFP4_SM120_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "chosen": ["stranger", 0, "stranger"],
        "listed": ["stranger", "tiled"],
        "accepted": "stranger",
        "wrong": 0,
    }
    (record,) = (tmp_path / "cache/proofs").glob("stranger-*.json")
    assert json.loads(record.read_text())["reason"] is None
