# SPDX-License-Identifier: Apache-2.0
"""Does the library of a wheel load with these versions of torch, each in a virtual environment of its own?

    python scripts/try_torch_versions.py WHEEL 2.11.0 2.14.1
    python scripts/try_torch_versions.py WHEEL 2.11.0 --into DIRECTORY    # keeps the environments and finds them again

What pip takes for a version is mostly a build for CUDA, of some 5 GB; PIP_INDEX_URL can name another index. No GPU is
needed: the library is loaded, its ops looked up, and a call on the CPU has to be refused with the op's own words.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

# Run by an environment's Python. The last line is what main prints.
LOAD = """
import sys, torch
from vllm_mxfp4_sm120.backends.native import library
built = library.load()
ops = [getattr(torch.ops.mxfp4_sm120, name).default for name in ("moe_layer", "router_logits", "workspace_bytes")]
x = torch.ones(1, 64, dtype=torch.bfloat16)
try:
    torch.ops.mxfp4_sm120.router_logits(x, x, None)
except RuntimeError as refusal:
    assert "expected a CUDA tensor" in str(refusal), refusal
else:
    raise SystemExit("router_logits took a CPU tensor")
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}: loaded for {built}, {len(ops)} ops, {library.LIBRARY}")
"""


def attempt(wheel: Path, version: str, directory: Path) -> str | None:
    """What the library says of itself with this torch; None, with the reason on stderr, where it doesn't load."""
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, f"torch=={version}"], check=True)
    # The plugin's other dependencies aren't asked for: the library needs torch alone.
    subprocess.run([*pip, "--no-deps", "--force-reinstall", wheel], check=True)
    done = subprocess.run([python, "-c", LOAD], cwd=directory, stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("versions", nargs="+", metavar="version")
    parser.add_argument("--into", type=Path, help="where the environments are kept; by default nowhere")
    args = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="mxfp4-sm120-torch-") as own:
        for version in args.versions:
            said = attempt(args.wheel.resolve(), version, (args.into or Path(own)).resolve() / f"torch-{version}")
            print(said or f"torch {version}: the library doesn't load, see above", flush=True)
            failed += said is None
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
