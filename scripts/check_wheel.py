# SPDX-License-Identifier: Apache-2.0
"""Is a wheel with the CUDA library fit to be published? Prints what isn't, one line each.

    python scripts/check_wheel.py dist/vllm_mxfp4_sm120-*.whl

Needs auditwheel. Looks at the wheel alone; scripts/try_torch_versions.py loads it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

LARGEST = 45_000_000  # bytes
GLIBC = 28  # of glibc 2.x, and what torch's own wheels need
LIBRARY = "vllm_mxfp4_sm120/_native.so"
# Those of the torch that has been imported when the library is loaded. The driver's libcuda isn't among them either:
# the CUDA runtime opens it by name when there is a GPU.
TORCH = {"libtorch.so", "libtorch_cpu.so"}


def problems(wheel: Path) -> Iterator[str]:
    """One line for each thing that is wrong with it."""
    python, abi, platform = wheel.stem.split("-")[-3:]
    if (python, abi) != ("py3", "none") or not platform.startswith(f"manylinux_2_{GLIBC}_"):
        yield f"its tag is {python}-{abi}-{platform}, expected py3-none-manylinux_2_{GLIBC}_<machine>"
    if (size := wheel.stat().st_size) > LARGEST:
        yield f"it has {size / 1e6:.1f} MB, expected {LARGEST / 1e6:.0f} at most"
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if ".so" in Path(name).suffixes]
    if libraries != [LIBRARY]:
        yield f"its libraries are {libraries}, expected {LIBRARY} alone"
        return
    command = [sys.executable, "-m", "auditwheel", "show", "--json", str(wheel)]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    needed = said["sym_tag"].split("_")  # manylinux_2_17_x86_64
    if needed[0] != "manylinux" or int(needed[2]) > GLIBC:
        yield f"its symbols need {said['sym_tag']}, expected glibc 2.{GLIBC} at most: {said['versioned_symbols']}"
    if other := set(said["external_libs"]) - TORCH:
        yield f"it needs {', '.join(sorted(other))} of the system, expected libraries of torch alone"


def main() -> int:
    wrong = 0
    for wheel in map(Path, sys.argv[1:]):
        found = list(problems(wheel))
        print(f"{wheel.name}: {'; '.join(found) or f'right, {wheel.stat().st_size / 1e6:.1f} MB'}")
        wrong += bool(found)
    return 1 if wrong or len(sys.argv) == 1 else 0


if __name__ == "__main__":
    sys.exit(main())
