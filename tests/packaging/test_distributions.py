# SPDX-License-Identifier: Apache-2.0
"""What is in the sdist and in a wheel made of it, in trees as they are on developers' machines."""

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from vllm_mxfp4_sm120 import __version__

ROOT = Path(__file__).parents[2]
BUILD = "import sys; sys.path.insert(0, 'scripts'); import build_backend; build_backend.build_{}(sys.argv[1])"


def make(kind: str, tree: Path, output: Path) -> Path:
    """An sdist or wheel without the CUDA library, by this environment's setuptools."""
    command = [sys.executable, "-c", BUILD.format(kind), str(output)]
    environment = {**os.environ, "MXFP4_SM120_BUILD": "0"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return max(output.iterdir(), key=lambda path: path.stat().st_mtime_ns)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with what earlier builds left in it."""
    tree = tmp_path_factory.mktemp("tree") / "project"
    junk = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=junk, symlinks=True)
    for stale in ("vllm_mxfp4_sm120/_native.so", "build/lib/vllm_mxfp4_sm120/_native.so", "kernels/build/_native.so"):
        (tree / stale).parent.mkdir(parents=True, exist_ok=True)
        (tree / stale).write_text("junk")
    shutil.copy(ROOT / "kernels/.clang-format", tree / "kernels")
    return tree


def test_a_wheel_of_the_sdist_has_everything_and_nothing_stale(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "sdist").mkdir(), (tmp_path / "wheel").mkdir()
    with tarfile.open(make("sdist", tree, tmp_path / "sdist")) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path, filter="data")
    assert not [name for name in names if name.endswith(".so")]
    wheel = make("wheel", tmp_path / f"vllm_mxfp4_sm120-{__version__}", tmp_path / "wheel")
    assert wheel.name == f"vllm_mxfp4_sm120-{__version__}-py3-none-any.whl"
    packed = set(zipfile.ZipFile(wheel).namelist())
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    package = {name for name in listed if name.startswith("vllm_mxfp4_sm120/")}
    kernels = {f"vllm_mxfp4_sm120/{name}" for name in listed if name.startswith("kernels/csrc/")}
    assert kernels and package | kernels <= packed
    assert {"vllm_mxfp4_sm120/py.typed", "vllm_mxfp4_sm120/configs/tiny/config.json"} <= packed


def test_a_wheel_of_the_tree_has_no_stale_library(tree: Path, tmp_path: Path) -> None:
    packed = zipfile.ZipFile(make("wheel", tree, tmp_path)).namelist()
    assert not [name for name in packed if name.endswith(".so")]


def test_a_gpu_without_nvcc_gets_the_compiler_from_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 12.0\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.delenv("MXFP4_SM120_BUILD", raising=False)
    kernels = runpy.run_path(str(ROOT / "kernels/setup.py"))
    assert kernels["cards"]() == ["12.0"] and kernels["wanted"]()
    kernels["requirements"].__globals__["nvcc"] = lambda: None  # this machine may have one in /usr/local/cuda
    assert kernels["requirements"]() == [*kernels["NVCC_PACKAGES"], "cmake", "ninja"]


def test_the_environment_of_a_gpu_leaves_the_build_to_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path(str(ROOT / "scripts/environment.py"))
    calls: list[tuple] = []
    script["main"].__globals__.update(has_nvidia_gpu=lambda: True, pip=lambda python, *rest: calls.append(rest))
    monkeypatch.setattr(sys, "argv", ["environment.py", str(tmp_path / "venv")])
    monkeypatch.setattr("venv.create", lambda *arguments, **options: None)
    assert script["main"]() == 0
    assert calls == [("install", script["VLLM_CUDA"]), ("install", "--editable", f"{ROOT}[test]")]
