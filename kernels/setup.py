# SPDX-License-Identifier: Apache-2.0
"""Builds the CUDA library: which cards for, with which compiler, and what to do where it can't be built.

The package's setup.py and `mxfp4-sm120 build` call `build`. Alone, all of build.sh's options: `bash kernels/build.sh`.
Imports only the standard library, since it runs in pip's build environment.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

KERNELS = Path(__file__).resolve().parent
NAME = "_native.so"
SWITCH = "MXFP4_SM120_BUILD"
# CUDA 13's compiler as the package index has it: nvcc itself, the C++ headers it includes, the runtime that is linked.
NVCC_PACKAGES = ("nvidia-cuda-nvcc>=13", "nvidia-cuda-cccl>=13", "nvidia-cuda-runtime>=13")
OLDEST_CARD = (8, 0)  # BF16 tensor cores begin there


class CannotBuild(SystemExit):
    """One line that says why and what to do. pip shows the last line of a build that ends so."""


def cards() -> list[str]:
    """The capabilities of this machine's GPUs, such as ["12.0"], as far as the kernels run on them."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    query = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    found = {tuple(map(int, text.split("."))) for text in re.findall(r"^\d+\.\d+$", listed, re.MULTILINE)}
    return [f"{major}.{minor}" for major, minor in sorted(found) if (major, minor) >= OLDEST_CARD]


def wanted() -> bool:
    """Is the library to be built: `MXFP4_SM120_BUILD` says, and where it doesn't, a GPU that could run it."""
    switch = os.environ.get(SWITCH, "")
    if switch not in ("", "0", "1"):
        raise CannotBuild(f"{SWITCH}={switch!r} is not accepted: expected 0 (install without the CUDA library) or 1")
    return switch == "1" or (switch == "" and bool(cards()))


def requirements() -> list[str]:
    """What pip has to put into its build environment. Raises CannotBuild where that wouldn't be enough."""
    if not wanted():
        return []
    if host_compiler() is None:
        raise CannotBuild(no_host_compiler())
    needed = [] if nvcc() else list(NVCC_PACKAGES)
    needed += [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    return needed if torch_folder() else [*needed, "torch>=2.11"]


def why_not() -> str | None:
    """One line saying why the library can't be built here and what to do, None if it can."""
    if host_compiler() is None:
        return no_host_compiler()
    if nvcc() is None:
        return "nvcc isn't on PATH, under CUDA_HOME or among Python's packages: pip install " + " ".join(
            f"'{package}'" for package in NVCC_PACKAGES
        )
    if shutil.which("cmake") is None:
        return "cmake isn't on PATH: pip install cmake ninja"
    if torch_folder() is None:
        return f"{sys.prefix} has no torch, whose headers are needed: pip install 'torch>=2.11'"
    return None


def host_compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def no_host_compiler() -> str:
    return "no C++ compiler is on PATH: install g++ (apt install g++), or install without the CUDA library, " + (
        f"which leaves the slower backends: {SWITCH}=0"
    )


def nvcc() -> str | None:
    """nvcc's path: the machine's own, else the one from the package index."""
    homes = [home for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    packaged = [str(nvcc.parent) for folder in sys.path for nvcc in Path(folder or ".").glob("nvidia/cu*/bin/nvcc")]
    places = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes), *packaged]
    return os.environ.get("CUDACXX") or shutil.which("nvcc", path=os.pathsep.join(places))


def torch_folder() -> Path | None:
    """torch's package folder: this interpreter's, or that of the environment which pip installs into.

    pip's build environment hides the other's packages from the import system, but only headers and the names of
    libraries are wanted, of any torch from 2.11.
    """
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    for scheme in ("platlib", "purelib"):
        folder = Path(sysconfig.get_path(scheme)) / "torch"
        if (folder / "include/torch/csrc/stable").is_dir():
            return folder
    return None


def build(output: Path, for_cards: list[str] | None = None, scratch: Path | None = None) -> Path:
    """Build the library to `output` and return it; a half-built one never stands there.

    `for_cards` (capabilities) None compiles for all that are supported, unless TORCH_CUDA_ARCH_LIST or
    CMAKE_CUDA_ARCHITECTURES choose. Raises CannotBuild, and CalledProcessError where compiling fails.
    """
    reason = why_not()
    if reason is not None:
        raise CannotBuild(f"vllm-mxfp4-sm120: the CUDA library can't be built: {reason}")
    environment = {**os.environ, "PYTHON": sys.executable, "CUDACXX": str(nvcc())}
    if for_cards and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        environment["TORCH_CUDA_ARCH_LIST"] = " ".join(for_cards)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mxfp4-sm120-build-") as own:
        environment["BUILD_DIR"] = str(scratch or own)
        command = ["bash", str(KERNELS / "build.sh"), "-o", str(output), "--", f"-DTORCH={torch_folder()}"]
        subprocess.run(command, check=True, env=environment)
    return output


if __name__ == "__main__":
    print(build(Path(sys.argv[1] if len(sys.argv) > 1 else NAME).absolute()))
