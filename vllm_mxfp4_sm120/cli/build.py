# SPDX-License-Identifier: Apache-2.0
"""`mxfp4-sm120 build`: compile the CUDA library for this machine's card, with tools from the package index."""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vllm_mxfp4_sm120.backends.native import library
from vllm_mxfp4_sm120.cache import make_folder, others_may_write
from vllm_mxfp4_sm120.cli.ending import Outcome
from vllm_mxfp4_sm120.drafts import draft_of

EXAMPLES = """examples:
  mxfp4-sm120 build
  mxfp4-sm120 build --all

Into the package where that can be written, else into the cache directory (MXFP4_SM120_CACHE_DIR). pip or uv fetch
nvcc, CMake and Ninja where they are missing; a C++ compiler (g++) must be here.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("--all", action="store_true", help="for every supported card, not only this machine's")


def run(args: argparse.Namespace) -> Outcome:
    """Raises RuntimeError where nothing can be compiled or the compiler fails, OSError for a full disk."""
    kernels = runpy.run_path(str(library.sources() / "setup.py"))
    try:
        here = kernels["cards"]()
        if not here and not args.all:
            raise RuntimeError("no NVIDIA GPU from sm_80 on is here: --all compiles for every card")
        cards = None if args.all else here
        targets = places(here)
        print(f"compiling for {' '.join(cards) if cards else 'every supported card'}", flush=True)
        with tempfile.TemporaryDirectory(prefix="mxfp4-sm120-build-") as tools:
            fetch(kernels["missing"](cards), Path(tools))
            kernels["build"](targets[0], cards)
    except SystemExit as error:  # kernels/setup.py also runs inside pip
        if isinstance(error.code, int):  # a signal's
            raise
        raise RuntimeError(str(error)) from None
    finish(targets, here)
    return Outcome([f"built {' '.join(map(os.fspath, targets))}"])


def places(cards: Sequence[str]) -> list[Path]:
    """Where the library goes: into the package, else for each card into the cache directory.

    Raises RuntimeError where neither can be, OSError where the cache directory can't be made.
    """
    package = library.LIBRARY.parent
    if os.access(package, os.W_OK):
        return [library.LIBRARY]
    cached = [path for path in map(_cached, cards) if path is not None]
    if not cached:
        raise RuntimeError(f"{package} can't be written, and there is no cache directory or no GPU to build for it")
    folder = cached[0].parent
    make_folder(folder)
    if distrusted := others_may_write(folder):
        raise RuntimeError(f"{distrusted}: no code would be loaded from {folder}, MXFP4_SM120_CACHE_DIR names another")
    return cached


def finish(targets: Sequence[Path], cards: Sequence[str]) -> None:
    """The first of the targets has been built: the others are copies, and what is older isn't found any more."""
    targets[0].chmod(0o644)  # whatever the umask is: what others may write isn't loaded
    for other in targets[1:]:
        with draft_of(other) as draft:
            shutil.copyfile(targets[0], draft)
    if targets[0] == library.LIBRARY:
        for path in map(_cached, cards):
            if path is not None:
                path.unlink(missing_ok=True)


def fetch(packages: Sequence[str], tools: Path) -> None:
    """Put packages into `tools`, apart from the environment's: torch may depend on other versions of them."""
    if not packages:
        return
    print(f"fetching {' '.join(packages)}", flush=True)
    installer = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else [shutil.which("uv"), "pip"]
    if None in installer:
        raise RuntimeError(f"neither pip nor uv is here to fetch {' '.join(packages)}: put nvcc and cmake on PATH")
    command = [*installer, "install", "--quiet", "--target", str(tools), *packages]
    if subprocess.run(command, check=False).returncode:
        raise RuntimeError(f"{' '.join(packages)} could not be installed, see above: put nvcc and cmake on PATH")
    sys.path.append(str(tools))
    os.environ["PATH"] = os.pathsep.join([str(tools / "bin"), os.environ.get("PATH", "")])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(tools), *filter(None, [os.environ.get("PYTHONPATH")])])


def _cached(card: str) -> Path | None:
    major, minor = map(int, card.split("."))
    return library.cache_path((major, minor))
