# SPDX-License-Identifier: Apache-2.0
"""The wheel with the CUDA library, from the sdist, in a new environment, by the compiler that pip brings."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from test_distributions import make

from vllm_mxfp4_sm120 import __version__

ROOT = Path(__file__).parents[2]
# Not pip's, and not this package, which is installed here too.
OWN = ("pip", "pkg_resources", "setuptools", "_distutils", "distutils", "__editable__", "vllm_mxfp4_sm120")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with this one's torch, a copy of which would take a minute."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if not package.name.startswith(OWN) and package.suffix != ".pth":
            (site / package.name).symlink_to(package)
    return folder


@pytest.fixture(scope="module")
def wheel(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built where no nvcc is, for one card only and with little optimization, since both take their time."""
    output = tmp_path_factory.mktemp("wheel")
    sdist = make("sdist", ROOT, tmp_path_factory.mktemp("sdist"))
    path = [folder for folder in os.get_exec_path() if shutil.which("nvcc", path=folder) is None]
    settings = {"PATH": os.pathsep.join(path), "CUDA_HOME": str(output), "MXFP4_SM120_BUILD": "1"}
    machine = {name: value for name, value in os.environ.items() if name not in ("CUDACXX", "PYTHONPATH")}
    command = [environment / "bin/python", "-m", "pip", "wheel", "--no-deps", "--wheel-dir", output, sdist]
    done = subprocess.run(
        command,
        env={**machine, **settings, "TORCH_CUDA_ARCH_LIST": "9.0", "NVCC_APPEND_FLAGS": "-Xcicc -O1 -Xptxas -O1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return next(output.glob("*.whl"))


def test_it_is_fit_to_be_published(wheel: Path) -> None:
    """Its tag is computed from the library's symbols; auditwheel finds the same."""
    assert wheel.name.startswith(f"vllm_mxfp4_sm120-{__version__}-py3-none-manylinux_2_28_")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/check_wheel.py", wheel], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_loads_and_its_ops_are_registered(wheel: Path, environment: Path) -> None:
    python = environment / "bin/python"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", wheel]
    machine = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(pip, env=machine, check=True)
    load = runpy.run_path(str(ROOT / "scripts/try_torch_versions.py"))["LOAD"]
    done = subprocess.run(
        [python, "-c", load], cwd=environment, env=machine, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "loaded for 90-real, 3 ops" in done.stdout
    assert str(environment) in done.stdout  # the wheel's library, not this tree's
