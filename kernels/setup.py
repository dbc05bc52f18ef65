"""Builds the CUDA library when the package is installed, where nvcc and torch are; says so where they aren't.

The package's setup.py calls `build`. Alone: `python kernels/setup.py [options of kernels/build.sh]`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

KERNELS = Path(__file__).resolve().parent
LIBRARY = KERNELS.parent / "vllm_mxfp4_sm120" / "_native.so"


def why_not() -> str | None:
    """One line saying why the library can't be built here, None if it can."""
    if nvcc() is None:
        return "nvcc isn't on PATH, nor under CUDA_HOME or /usr/local/cuda"
    if shutil.which("cmake") is None:
        return "cmake isn't on PATH"
    # pip builds in an environment of its own unless told not to, and there is no torch in it.
    if importlib.util.find_spec("torch") is None:
        return "this Python has no torch: install torch first, then with --no-build-isolation"
    return None


def nvcc() -> str | None:
    """nvcc's path, as CMakeLists.txt looks for it."""
    places = [
        os.environ.get("PATH", ""),
        *(f"{home}/bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home),
    ]
    return os.environ.get("CUDACXX") or shutil.which("nvcc", path=os.pathsep.join(places))


def build(*options: str) -> Path | None:
    """Build the library into the package and return its path, or say why not and return None.

    Raises subprocess.CalledProcessError when compiling fails: a missing compiler is no error, a broken build is.
    """
    reason = why_not()
    if reason is not None:
        print(f"vllm-mxfp4-sm120: installing without the CUDA library: {reason}", file=sys.stderr)
        return None
    subprocess.run(
        ["bash", str(KERNELS / "build.sh"), *options], check=True, env={**os.environ, "PYTHON": sys.executable}
    )
    return LIBRARY


if __name__ == "__main__":
    sys.exit(0 if build(*sys.argv[1:]) else 1)
