# SPDX-License-Identifier: Apache-2.0
"""How tests build the CUDA library, look into it, and load it: each in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"
ARCHITECTURES = {"sm_80", "sm_90", "sm_120", "sm_121"}


def run(*command: object, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**os.environ, **environment}
    )
    if check and result.returncode:
        pytest.fail(f"{' '.join(map(str, command))} failed:\n{result.stdout[-4000:]}{result.stderr[-4000:]}")
    return result


def build(*options: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return run("bash", KERNELS / "build.sh", *options, PYTHON=sys.executable, **environment)


def cuobjdump() -> object:
    """From the CUDA toolkit, or the package of that name (the one in Triton 3.6 doesn't know sm_121)."""
    on_path = shutil.which("cuobjdump")
    if on_path is not None:
        return on_path
    package = "nvidia-cuda-cuobjdump"
    program = next(file for file in metadata.files(package) or () if file.name == "cuobjdump")
    return metadata.distribution(package).locate_file(program)


def in_a_new_process(library: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with the backend's library at `library`: a process can load only one."""
    start = f"""
import pathlib, torch
from vllm_mxfp4_sm120.backends.native import Native, library, tuning
from vllm_mxfp4_sm120.moe import MoEShape, MoEWeights
from vllm_mxfp4_sm120.platform import Machine
library.LIBRARY = pathlib.Path({str(library)!r})
shape = MoEShape(4, 4, 64, 32, 2)
x, logits = torch.ones(3, 64, dtype=torch.bfloat16), torch.zeros(3, 4)
"""
    return run(sys.executable, "-c", start + code, check=False, **environment)
