# SPDX-License-Identifier: Apache-2.0
"""`with_flashinfer.py` run against real FlashInfers, installed aside for it: the oldest that works and the newest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RELEASES = {"0.6.14": "==0.6.14", "0.7": ">=0.7,<0.8"}


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Future[str | None]]]:
    """Why each one couldn't be tried, None where it was: all at the same time, for they wait and compute in turn."""
    with ThreadPoolExecutor() as pool:
        yield {name: pool.submit(run, name, requirement) for name, requirement in RELEASES.items()}


def run(name: str, requirement: str) -> str | None:
    target = ROOT / "build" / "flashinfer" / name
    if not target.exists():
        draft = target.with_name(f"{name}.{os.getpid()}")
        # Without dependencies they import on any machine, all their Python there.
        wanted = [f"flashinfer-python{requirement}", "nvidia-ml-py", "apache-tvm-ffi"]
        options = ["--quiet", "--no-deps", "--no-compile", "--target", str(draft)]
        pip = [sys.executable, "-m", "pip", "install", *options, *wanted]
        done = subprocess.run(pip, capture_output=True, text=True, timeout=600)
        if done.returncode:
            shutil.rmtree(draft, ignore_errors=True)
            return f"pip can't install flashinfer-python{requirement}: {done.stderr.strip().splitlines()[-1]}"
        draft.rename(target)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/packaging/with_flashinfer.py"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(target), str(ROOT)])},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return None


@pytest.mark.parametrize("name", RELEASES)
def test_against_the_real_flashinfer(name: str, runs: dict[str, Future[str | None]]) -> None:
    if (reason := runs[name].result()) is not None:
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
