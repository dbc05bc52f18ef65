# SPDX-License-Identifier: Apache-2.0
"""For which cards the FP4 kernels are compiled, and by which nvcc. test_stub.py: a library that has none."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from tests.kernels.building import KERNELS, run

KNOWN = {  # the newest cards that an nvcc's --list-gpu-arch says
    "12.6": ("80", "89", "90"),
    "12.8": ("80", "89", "90", "100", "120"),
    "12.9": ("80", "89", "90", "100", "103", "120", "121"),
    "13.0": ("80", "89", "90", "100", "103", "120", "121"),
}


def compiler(folder: Path, release: str, real: object = "false") -> Path:
    """An nvcc that says it is of that release, and is `real` for all else."""
    known = "\\n".join(f"compute_{number}" for number in KNOWN[release])
    program = folder / "nvcc"
    program.write_text(
        f"""#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.93" ;;
  --list-gpu-arch) printf '{known}\\n' ;;
  *) exec {real} "$@" ;;
esac
"""
    )
    program.chmod(0o755)
    return program


@pytest.mark.parametrize(
    ("release", "cards", "expected"),
    [
        # The default: every card that the compiler knows.
        ("12.6", "", ""),
        ("12.8", "", "120a-real"),
        ("12.9", "", "120f-real"),
        ("13.0", "", "120f-real"),
        # One family for both, or each its own where there are no families.
        ("12.6", "12.0", ""),
        ("12.8", "12.0", "120a-real"),
        ("12.8", "12.0 12.1", "120a-real;121a-real"),
        ("12.9", "12.0 12.1", "120f-real"),
        ("13.0", "12.1", "121f-real"),
        # However SM 12.x is said, and PTX of it: of the instruction there is no portable PTX.
        ("13.0", "12.0a", "120f-real"),
        ("13.0", "12.0f", "120f-real"),
        ("13.0", "12.1+PTX", "121f-real"),
        ("13.0", "9.0 12.0+PTX", "120f-real"),
        ("13.0", "Blackwell", "120f-real"),
        # No card that has it.
        ("13.0", "8.0 8.6 8.9 9.0+PTX", ""),
        ("13.0", "Hopper", ""),
        ("13.0", "10.0 10.3", ""),
    ],
)
def test_for_which_cards(tmp_path: Path, release: str, cards: str, expected: str):
    assert fp4_architectures(compiler(tmp_path, release), cards) == expected


def test_without_a_compiler_for_none(tmp_path: Path):
    assert fp4_architectures(tmp_path / "nvcc", "12.0") == ""


def fp4_architectures(nvcc: Path, cards: str) -> str:
    environment = {"TORCH_CUDA_ARCH_LIST": cards, "CMAKE_CUDA_ARCHITECTURES": ""}
    return run(
        "cmake", "-DFP4=ON", f"-DNVCC={nvcc}", "-P", KERNELS / "architectures.cmake", **environment
    ).stderr.strip()


def test_a_compiler_that_is_too_old_builds_all_else(tmp_path: Path):
    """What CMake compiles then: no FP4 kernel, and in their place a table of none; in a folder of any name."""
    real = runpy.run_path(str(KERNELS / "setup.py"))["nvcc"]()
    if real is None:
        pytest.skip("nvcc isn't here to compile with")
    nvcc = compiler(tmp_path, "12.6", real)
    kernels = shutil.copytree(KERNELS, tmp_path / "fp4" / "kernels", ignore=shutil.ignore_patterns("build"))
    configure = ("cmake", "-S", kernels, "-B", tmp_path / "build", f"-DPython3_EXECUTABLE={sys.executable}")
    run(*configure, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", CUDACXX=str(nvcc), TORCH_CUDA_ARCH_LIST="9.0 12.0")
    commands = json.loads((tmp_path / "build" / "compile_commands.json").read_text())
    compiled = {
        Path(command["file"]).relative_to(kernels / "csrc").as_posix(): command["command"] for command in commands
    }
    assert {name for name in compiled if name.startswith("fp4/")} == {"fp4/ops.cpp", "fp4/none.cpp"}
    cards = set(re.findall(r"code=\[(\w+)\]", compiled["grouped/grouped_gemms.cu"]))
    assert cards == {"sm_90", "sm_120"}
