# SPDX-License-Identifier: Apache-2.0
"""Is the machine code of two builds of the CUDA library the same, kernel by kernel?

    python scripts/compare_sass.py OLD.so NEW.so

Kernels are matched by their code, then by their names: a name may change (a file moved, a template argument was
renamed), an instruction may not. Exits with 1 where a kernel's code has no equal in the other build.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

# An instruction with its encoding, and the second half of that.
CODE = r"/\*[0-9a-f]{4,}\*/.*|/\* 0x[0-9a-f]+ \*/"


@dataclass(frozen=True)
class Kernel:
    arch: str
    name: str
    code: tuple[str, ...]  # instructions and their encodings, which hold what the text leaves out (stalls, barriers)


def cuobjdump() -> str:
    """CUDA's own, or the one of the package nvidia-cuda-cuobjdump."""
    on_path = shutil.which("cuobjdump")
    if on_path is not None:
        return on_path
    package = "nvidia-cuda-cuobjdump"
    try:
        program = next(file for file in metadata.files(package) or () if file.name == "cuobjdump")
    except (metadata.PackageNotFoundError, StopIteration):
        sys.exit(f"cuobjdump isn't on PATH, expected CUDA's toolkit or the package {package}")
    return str(metadata.distribution(package).locate_file(program))


def kernels(library: Path) -> Iterator[Kernel]:
    listing = subprocess.run([cuobjdump(), "--dump-sass", library], capture_output=True, text=True, check=True).stdout
    for part in listing.split("\narch = ")[1:]:
        arch = part.split(maxsplit=1)[0]
        for function in part.split("Function : ")[1:]:
            name, _, body = function.partition("\n")
            yield Kernel(
                arch, readable(name.strip()), tuple(re.findall(r"/\*[0-9a-f]{4,}\*/.*|/\* 0x[0-9a-f]+ \*/", body))
            )


def readable(mangled: str) -> str:
    """The name without its arguments, and without what the compiler makes of the file's name."""
    filter_ = shutil.which("c++filt")
    name = subprocess.run([filter_, mangled], capture_output=True, text=True).stdout.strip() if filter_ else mangled
    name = re.sub(r"\(anonymous namespace\)::|mxfp4_sm120::|_GLOBAL__N__\w+::|^void ", "", name)
    return re.sub(r"\((?!anonymous).*", "", name)


def report(old: list[Kernel], new: list[Kernel]) -> tuple[list[str], bool]:
    """One line a kernel, and whether all are the same."""
    lines, rest, same = [], list(old), True
    unmatched = []
    for kernel in new:
        equal = [k for k in rest if k.arch == kernel.arch and k.code == kernel.code]
        equal.sort(key=lambda k: k.name != kernel.name)
        if equal:
            rest.remove(equal[0])
            was = "" if equal[0].name == kernel.name else f" (was {equal[0].name})"
            lines.append(f"{kernel.arch}  same     {kernel.name}{was}")
        else:
            unmatched.append(kernel)
    for kernel in unmatched:
        same = False
        near = [k for k in rest if k.arch == kernel.arch]
        if not near:
            lines.append(f"{kernel.arch}  added    {kernel.name}")
            continue
        before = max(near, key=lambda k: difflib.SequenceMatcher(None, k.name, kernel.name).ratio())
        rest.remove(before)
        lines.append(f"{kernel.arch}  differs  {kernel.name} (was {before.name}): {difference(before, kernel)}")
    lines += [f"{kernel.arch}  removed  {kernel.name}" for kernel in rest]
    return lines, same and not rest


def difference(before: Kernel, after: Kernel) -> str:
    def operations(kernel: Kernel) -> dict[str, int]:
        counts: dict[str, int] = {}
        for line in kernel.code:
            match = re.match(r"/\*\w+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)
            if match:
                counts[match[1]] = counts.get(match[1], 0) + 1
        return counts

    was, now = operations(before), operations(after)
    changes = [
        f"{op} {was.get(op, 0)} -> {now.get(op, 0)}" for op in sorted({*was, *now}) if was.get(op) != now.get(op)
    ]
    total = f"{sum(was.values())} -> {sum(now.values())} instructions"
    return "; ".join([total, *(changes or ["the same ones, in another order or with other registers"])])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    given = parser.parse_args()
    lines, same = report(list(kernels(given.old)), list(kernels(given.new)))
    print("\n".join(sorted(lines)))
    print(f"{'all the same' if same else 'not the same'}: {len(lines)} kernels")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
