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


def test_a_wheel_without_the_library_is_not_published(tree: Path, tmp_path: Path) -> None:
    problems = list(runpy.run_path(str(ROOT / "scripts/check_wheel.py"))["problems"](make("wheel", tree, tmp_path)))
    assert problems == [
        "its tag is py3-none-any, expected py3-none-manylinux_2_28_<machine>",
        "its libraries are [], expected vllm_mxfp4_sm120/_native.so alone",
    ]


def fake(program: Path, *says: str) -> Path:
    """A program that prints these lines whatever it is asked."""
    program.parent.mkdir(exist_ok=True)
    program.write_text("#!/bin/sh\n" + "".join(f"echo {line}\n" for line in says))
    program.chmod(0o755)
    return program


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its programs' folder: an RTX 5090, a C++ compiler, no nvcc."""
    programs = tmp_path / "programs"
    fake(programs / "nvidia-smi", "12.0, 580.95.05")
    fake(programs / "c++")
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for name in ("CXX", "CUDACXX", "MXFP4_SM120_BUILD", "TORCH_CUDA_ARCH_LIST", "CMAKE_CUDA_ARCHITECTURES"):
        monkeypatch.delenv(name, raising=False)
    # No nvcc among Python's packages: this environment may have one.
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if not list(Path(folder).glob("nvidia/cu*/bin"))])
    return programs


def kernels() -> dict:
    return runpy.run_path(str(ROOT / "kernels/setup.py"))


def requirements() -> set[str]:
    """Those of the build; whether torch is here isn't asked."""
    return {name for name in kernels()["requirements"]() if not name.startswith("torch")}


def test_a_gpu_without_nvcc_gets_the_compiler_from_pip(machine: Path) -> None:
    assert kernels()["cards"]() == ["12.0"] and kernels()["wanted"]()
    assert requirements() == {*kernels()["NVCC_PACKAGES"], "cmake", "ninja"}


def test_an_nvcc_that_is_older_than_the_card_is_passed_over(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(machine / "nvcc", "compute_80", "compute_90")
    assert requirements() == {*kernels()["NVCC_PACKAGES"], "cmake", "ninja"}
    monkeypatch.setenv("MXFP4_SM120_BUILD", "1")  # for every card
    assert requirements() == {*kernels()["NVCC_PACKAGES"], "cmake", "ninja"}
    fake(machine / "nvcc", "compute_80", "compute_120", "compute_121")
    assert requirements() == {"cmake", "ninja"}


def test_a_driver_that_is_too_old_for_that_compiler_is_named(machine: Path) -> None:
    fake(machine / "nvidia-smi", "12.0, 570.86.10")
    with pytest.raises(SystemExit, match=r"the driver is 570, .* needs 580: update it, or put an nvcc of CUDA 12\.8"):
        requirements()
    fake(machine / "nvcc", "compute_120")
    assert requirements() == {"cmake", "ninja"}


def test_a_gpu_and_no_way_to_build_is_one_line(machine: Path, tree: Path) -> None:
    """As pip would run it. With MXFP4_SM120_BUILD=0 the same machine gets a wheel without the library."""
    (machine / "c++").unlink()
    hook = "import sys; sys.path.insert(0, 'scripts'); import build_backend as b; b.get_requires_for_build_wheel()"
    command = [sys.executable, "-c", hook]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr == (
        "vllm-mxfp4-sm120: the CUDA library can't be built: no C++ compiler is on PATH: install g++ (apt install g++), "
        "or install without the CUDA library, which leaves the slower backends: MXFP4_SM120_BUILD=0\n"
    )
    allowed = {**os.environ, "MXFP4_SM120_BUILD": "0"}
    assert subprocess.run(command, cwd=tree, env=allowed, capture_output=True, check=False).returncode == 0


def test_the_environment_of_a_gpu_leaves_the_build_to_pip(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path(str(ROOT / "scripts/environment.py"))
    calls: list[tuple] = []
    script["main"].__globals__.update(pip=lambda python, *rest: calls.append(rest))
    monkeypatch.setattr(sys, "argv", ["environment.py", str(machine.parent / "venv")])
    monkeypatch.setattr("venv.create", lambda *arguments, **options: None)
    assert script["main"]() == 0
    assert calls == [("install", script["VLLM_CUDA"]), ("install", "--editable", f"{ROOT}[test]")]
    # And what pip then asks the build for:
    assert set(kernels()["NVCC_PACKAGES"]) <= requirements()
