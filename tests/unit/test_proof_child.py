# SPDX-License-Identifier: Apache-2.0
"""The proof's process: it runs nothing from the working directory, and ends with the one that started it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import faulty
import pytest

from tests.support.processes import processes, wait_until
from vllm_mxfp4_sm120 import proof
from vllm_mxfp4_sm120.moe import MoEShape
from vllm_mxfp4_sm120.proof import child

SMALL = MoEShape(20, 20, 96, 160, 4)
ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent


def start(code, cwd, **env):
    """A process that asks for a proof, as `python -c` does it: with '' in sys.path."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", **env}
    return subprocess.Popen([sys.executable, "-c", code], cwd=cwd, env=env, stdout=subprocess.PIPE, text=True)


def test_nothing_in_the_working_directory_is_run(tmp_path):
    """The parent has imported its modules when it goes there, as a server does that is started anywhere."""
    bait = tmp_path / "bait"
    bait.mkdir()
    for name in ("torch", "numpy", "json", "sitecustomize", "usercustomize", "filelock", "vllm_mxfp4_sm120"):
        (bait / f"{name}.py").write_text("open('executed', 'w').write(__name__); raise SystemExit(3)")
    code = (
        "import os, sys, faulty; from vllm_mxfp4_sm120 import proof; from vllm_mxfp4_sm120.moe import MoEShape;"
        "os.chdir('bait'); sys.path[:0] = ['', '.', os.getcwd()];"
        "print(proof.solve_in_child(faulty.Good, MoEShape(20, 20, 96, 160, 4), 'cpu', 100))"
    )
    done = start(code, tmp_path)
    assert done.communicate(timeout=120)[0] == "Proof(reason=None, final=True)\n"
    assert not (bait / "executed").exists()


def test_the_import_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", ".", "lib", str(tmp_path), f"{tmp_path}/", "/usr/lib"])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert child.import_path() == ["/usr/lib"]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}/x")
    assert child.import_path() == [str(tmp_path), "/usr/lib"]
    tmp_path.rmdir()
    assert "/usr/lib" in child.import_path()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_its_parent(number, tmp_path):
    mark = f"MARK_OF_THIS_TEST={os.getpid()}-{number}"
    code = (
        "import faulty; from vllm_mxfp4_sm120 import proof; from vllm_mxfp4_sm120.moe import MoEShape;"
        "proof.solve_in_child(faulty.StartsACompiler, MoEShape(20, 20, 96, 160, 4), 'cpu', 100)"
    )
    started = tmp_path / "started"
    name, value = mark.split("=")
    parent = start(code, tmp_path, STARTED=str(started), **{name: value})
    try:
        wait_until(started.exists)
        assert len(processes(mark)) >= 3  # parent, child, what the child started
        parent.send_signal(number)
        parent.wait(60)
        wait_until(lambda: not processes(mark))
    finally:
        parent.kill()
        parent.communicate()


def test_what_cannot_be_started_may_go_away(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/python")
    found = proof.solve_in_child(faulty.Good, SMALL, "cpu", 10)
    assert found == proof.Proof(
        "its process could not be started: [Errno 2] No such file or directory: '/no/python'", final=False
    )


def test_how_it_ended():
    assert [child.how_it_ended(status) for status in (3, -9, -50)] == [
        "exit status 3",
        "killed by SIGKILL",
        "killed by signal 50",
    ]
