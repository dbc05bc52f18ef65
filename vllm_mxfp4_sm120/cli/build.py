# SPDX-License-Identifier: Apache-2.0
"""`mxfp4-sm120 build`: compile the CUDA library for this machine's card into the installed package."""

from __future__ import annotations

import argparse
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import vllm_mxfp4_sm120
from vllm_mxfp4_sm120.backends.native import library


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="for every supported card, not only this machine's")


def run(args: argparse.Namespace) -> int:
    """Returns 0. Raises RuntimeError where nothing can be compiled or the compiler fails."""
    kernels = runpy.run_path(str(kernels_folder() / "setup.py"))
    cards = None if args.all else kernels["cards"]()
    if not args.all and not cards:
        raise RuntimeError("no NVIDIA GPU of compute capability 8.0 or newer is here: --all compiles for every card")
    with tempfile.TemporaryDirectory(prefix="mxfp4-sm120-nvcc-") as toolkit:
        if kernels["nvcc"]() is None:
            print("fetching nvcc from the package index", flush=True)
            # Apart from the environment's packages: torch may depend on other versions of them.
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", toolkit, *kernels["NVCC_PACKAGES"]]
            if subprocess.run(pip, check=False).returncode:
                raise RuntimeError("pip could not install nvcc, see above: put a CUDA toolkit's nvcc on PATH")
            sys.path.append(toolkit)
        print(f"compiling for {' '.join(cards) if cards else 'every supported card'}", flush=True)
        try:
            kernels["build"](library.LIBRARY, cards)
        except subprocess.CalledProcessError as error:
            status = error.returncode
            raise RuntimeError(f"compiling failed, exit status {status}: the compiler's messages stand above") from None
        except SystemExit as error:
            raise RuntimeError(str(error)) from None
    print(f"built {os.fspath(library.LIBRARY)}")
    return 0


def kernels_folder() -> Path:
    """The sources: inside the package when installed, beside it in the repository."""
    package = Path(vllm_mxfp4_sm120.__file__).parent
    inside = package / "kernels"
    return inside if inside.is_dir() else package.parent / "kernels"
