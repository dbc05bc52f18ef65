# SPDX-License-Identifier: Apache-2.0
"""The CUDA library in the wheel. Everything else about the package is in pyproject.toml."""

import platform
import re
import runpy
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PACKAGE = Path(__file__).parent / "vllm_mxfp4_sm120"
MACHINES = {62: "x86_64", 183: "aarch64"}  # ELF's numbers for processors (its specification, e_machine)
KERNELS = runpy.run_path(str(PACKAGE.parent / "kernels" / "setup.py"))


class BuildPy(build_py):
    """The package anew, then the library beside it: nothing that an earlier build left behind is packed."""

    def run(self):
        target = PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE.name
        if not self.editable_mode:
            shutil.rmtree(target, ignore_errors=True)
        super().run()
        if not KERNELS["wanted"]():
            print(f"no GPU, or {KERNELS['SWITCH']}=0: without the CUDA library", file=sys.stderr)
            return
        KERNELS["build"](target / KERNELS["NAME"], KERNELS["target_cards"]())


class Wheel(bdist_wheel):
    """With the library, a wheel is for one platform, but for every Python: it needs torch's stable ABI, no Python's."""

    def get_tag(self):
        if not KERNELS["wanted"]():
            return "py3", "none", "any"
        return "py3", "none", self.platform()

    def platform(self):
        """By the library, which may have been compiled for another processor: manylinux_2_28 or what it needs."""
        build_py = self.get_finalized_command("build_py")
        library = Path(build_py.build_lib) / PACKAGE.name / KERNELS["NAME"]
        if not library.exists():  # asked for the tag alone, before anything is built
            return f"manylinux_2_28_{platform.machine()}"
        elf = library.read_bytes()
        glibc = max(28, *map(int, re.findall(rb"\0GLIBC_2\.(\d+)", elf)))
        return f"manylinux_2_{glibc}_{MACHINES[int.from_bytes(elf[18:20], 'little')]}"


setup(
    # configs/ and kernels/ are packages only by where a wheel has them.
    packages=[
        *find_packages(include=["vllm_mxfp4_sm120", "vllm_mxfp4_sm120.*"]),
        "vllm_mxfp4_sm120.configs",
        "vllm_mxfp4_sm120.kernels",
    ],
    cmdclass={"build_py": BuildPy, "bdist_wheel": Wheel},
)
