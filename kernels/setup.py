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
NEWEST_CARD = "12.1"
CHOICES = ("CMAKE_CUDA_ARCHITECTURES", "TORCH_CUDA_ARCH_LIST")  # these choose other cards than all supported ones
OLDEST_DRIVER = 580  # of CUDA 13: its runtime, which is linked in, refuses older ones


class CannotBuild(SystemExit):
    """One line that says why and what to do. pip shows the last line of a build that ends so."""

    def __init__(self, why: str) -> None:
        super().__init__(f"vllm-mxfp4-sm120: the CUDA library can't be built: {why}")


def cards() -> list[str]:
    """The capabilities of this machine's GPUs, such as ["12.0"], as far as the kernels run on them."""
    found = {tuple(map(int, capability.split("."))) for capability, _ in _gpus()}
    return [f"{major}.{minor}" for major, minor in sorted(found) if (major, minor) >= OLDEST_CARD]


def _gpus() -> list[tuple[str, str]]:
    """Capability and the driver's major version of each GPU."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    query = [smi, "--query-gpu=compute_cap,driver_version", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    return re.findall(r"^(\d+\.\d+), (\d+)\.", listed, re.MULTILINE)


def wanted() -> bool:
    """Is the library to be built: `MXFP4_SM120_BUILD` says, and where it doesn't, a GPU that could run it."""
    switch = os.environ.get(SWITCH, "")
    if switch not in ("", "0", "1"):
        raise CannotBuild(f"{SWITCH}={switch!r} is not accepted: expected 0 (install without the CUDA library) or 1")
    return switch == "1" or (switch == "" and bool(cards()))


def target_cards() -> list[str] | None:
    """Whom an installation builds for: this machine's cards, or with `MXFP4_SM120_BUILD=1` (None) all supported."""
    return None if os.environ.get(SWITCH) == "1" else cards()


def requirements() -> list[str]:
    """What pip has to put into its build environment. Raises CannotBuild where that wouldn't be enough."""
    return missing(target_cards()) if wanted() else []


def missing(for_cards: list[str] | None = None) -> list[str]:
    """What of the package index completes this machine's tools. Raises CannotBuild where that isn't enough."""
    if host_compiler() is None:
        without = f"or install without the CUDA library, which leaves the slower backends: {SWITCH}=0"
        raise CannotBuild(f"no C++ compiler is on PATH: install g++ (apt install g++), {without}")
    needed = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    if torch_folder() is None:
        needed.append("torch>=2.11")
    if nvcc(for_cards) is None:
        drivers = [int(driver) for _, driver in _gpus()]
        if for_cards and min(drivers, default=OLDEST_DRIVER) < OLDEST_DRIVER:
            raise CannotBuild(
                f"the driver is {min(drivers)}, and CUDA 13, whose nvcc the package index has, needs {OLDEST_DRIVER}: "
                f"update it, or put an nvcc of CUDA 12.8 or 12.9 that knows {' and '.join(for_cards)} on PATH"
            )
        needed += NVCC_PACKAGES
    return needed


def host_compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def nvcc(for_cards: list[str] | None = None) -> str | None:
    """The path of an nvcc that knows these cards: the machine's own, else the one from the package index."""
    if named := os.environ.get("CUDACXX"):
        return named
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    packaged = [str(nvcc.parent) for folder in sys.path for nvcc in Path(folder or ".").glob("nvidia/cu*/bin/nvcc")]
    for place in (*os.get_exec_path(), f"{home}/bin", *packaged):
        found = shutil.which("nvcc", path=place)
        if found and _knows(found, for_cards):
            return found
    return None


def _knows(nvcc: str, cards: list[str] | None) -> bool:
    """A distribution's own nvcc may be older than the card that it is to compile for."""
    if cards is None:
        cards = [] if any(map(os.environ.get, CHOICES)) else [NEWEST_CARD]
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout.split()
    return all(f"compute_{card.replace('.', '')}" in known for card in cards)


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
    CMAKE_CUDA_ARCHITECTURES choose. Raises CannotBuild.
    """
    if lacking := missing(for_cards):
        raise CannotBuild(f"{lacking[0]} isn't here: pip install {' '.join(map(repr, lacking))}")
    environment = {**os.environ, "PYTHON": sys.executable, "CUDACXX": str(nvcc(for_cards))}
    if for_cards and not any(map(os.environ.get, CHOICES)):
        environment["TORCH_CUDA_ARCH_LIST"] = " ".join(for_cards)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mxfp4-sm120-build-") as own:
        environment["BUILD_DIR"] = str(scratch or own)
        command = ["bash", str(KERNELS / "build.sh"), "-o", str(output), "--", f"-DTORCH={torch_folder()}"]
        if status := subprocess.run(command, check=False, env=environment).returncode:
            raise CannotBuild(
                f"the compiler failed (exit status {status}), its messages stand above; {SWITCH}=0 "
                "installs without the library"
            )
    return output


if __name__ == "__main__":
    print(build(Path(sys.argv[1] if len(sys.argv) > 1 else NAME).absolute()))
