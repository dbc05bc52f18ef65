# SPDX-License-Identifier: Apache-2.0
"""How many instructions a warp of the MoE kernels issues, counted in their machine code. fp4_speed.py's model takes it.

    python benchmarks/fp4_slots.py --json docs/data        (a minute; nvcc and nvdisasm of the CUDA toolkit, no GPU)

Of each kernel: its main loops, whose bodies are 64 along K (one for each number of tokens that a warp may have), and
what comes after K of a work tile: its outputs, the next one's place and first stages. What only a branch that is seldom
taken needs stands in there too, so that the counts are upper bounds.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fp4_tables import Table

CSRC = Path(__file__).resolve().parents[1] / "kernels" / "csrc"
PRODUCTS = ("OMMA", "HMMA")
FP4, BF16 = "fp4/fp4_layer.cu", "grouped/grouped_gemms.cu"
# Kernel, by its place in its table of configurations: those that the model takes, of many tokens.
KERNELS = {
    FP4: {f"{terms} term{'s'[: terms > 1]}": 2 * terms - 1 for terms in (1, 2, 3, 4)},
    BF16: {"tokens80": 4, "tokens112": 5, "tokens144": 6},
}
COLUMNS = [
    "kernel",
    "built for",
    "products of 64 along K",
    "beside them",
    "products with fewest tokens",
    "beside those",
    "after gate_up",
    "after down",
]


@dataclass(frozen=True)
class Instruction:
    name: str
    target: str  # of a branch: a label or an address
    line: int  # of the kernel's own file, of whatever was inlined there; 0 if nothing says


@dataclass
class Code:
    """A function's machine code, as cuobjdump or nvdisasm show it."""

    instructions: list[Instruction]
    places: dict[str, int]  # of labels and addresses

    def loops(self) -> list[range]:
        """The innermost ones with products."""
        found = []
        for at, instruction in enumerate(self.instructions):
            start = self.places.get(instruction.target, at + 1)
            if start <= at and any(each.name in PRODUCTS for each in self.instructions[start : at + 1]):
                found.append(range(start, at + 1))
        return [loop for loop in found if not any(_within(other, loop) for other in found if other != loop)]

    def products(self, loop: range) -> int:
        return sum(self.instructions[at].name in PRODUCTS for at in loop)


def _within(inner: range, outer: range) -> bool:
    return outer.start <= inner.start and inner.stop <= outer.stop


def functions(text: str, wanted: str) -> dict[str, Code]:
    """Those whose name has `wanted`. Lines are known where nvdisasm has been asked for them (-gi)."""
    found: dict[str, Code] = {}
    code, line = None, 0
    for row in text.splitlines():
        if name := re.match(r"\s*Function : (\w+)|\.text\.(\w+):", row):
            full = name[1] or name[2]
            code = found.setdefault(full, Code([], {})) if wanted in full else None
        elif code is None:
            continue
        elif label := re.match(r"(\.L_x_\d+):", row):
            code.places[label[1]] = len(code.instructions)
        elif "//## File" in row:  # innermost first: the last one before an instruction is the kernel's own
            for number in re.findall(r'\.cu", line (\d+)', row):
                line = int(number)
        elif part := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)([^;]*);", row):
            code.places[hex(int(part[1], 16))] = len(code.instructions)
            target = re.search(r"\.L_x_\d+|0x[0-9a-f]+", part[3]) if part[2] == "BRA" else None
            code.instructions.append(Instruction(part[2], target[0] if target else "", line))
    return found


def loops_of(code: Code) -> list[tuple[int, int]]:
    """Of each main loop its products and the instructions beside them, the largest first."""
    counts = ((code.products(loop), len(loop)) for loop in code.loops())
    return sorted(((products, length - products) for products, length in counts), reverse=True)


def after_k(code: Code, source: str) -> tuple[int, int]:
    """Instructions of a gate_up work tile, and of a down work tile, after their main loop."""
    lines = source.splitlines()

    def of(call: str) -> int:
        (line,) = (number for number, text in enumerate(lines, 1) if re.search(rf"^ +{call}", text))
        return line

    run, down, gate_up = of("run<S>"), of("store<false>"), of("store<true>")
    loops = code.loops()
    # From the first main loop on, to the outer loop's end: not what slow paths of shuffles have behind the kernel.
    outer = min(
        (
            range(code.places[each.target], at + 1)
            for at, each in enumerate(code.instructions)
            if code.places.get(each.target, at + 1) <= at
            and all(_within(loop, range(code.places[each.target], at)) for loop in loops)
        ),
        key=len,
    )
    beside = [at for at in outer if not any(at in loop for loop in loops)]
    count = {line: sum(code.instructions[at].line == line for at in beside) for line in range(1, len(lines) + 1)}
    both = count[run] // len(loops) + sum(n for line, n in count.items() if line > run and line not in (down, gate_up))
    return both + count[gate_up], both + count[down]


def machine_code(source: str, architecture: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, "kernel.cubin")
        options = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-lineinfo", "-cubin", f"-arch={architecture}")
        subprocess.run(["nvcc", *options, "-o", built, CSRC / source], check=True)
        return subprocess.run(["nvdisasm", "-gi", "-c", built], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="the table as fp4-slots.json, as docs/data has it")
    arguments = parser.parse_args()
    rows: list[list[object]] = []
    for source, architecture in ((FP4, "sm_120f"), (BF16, "sm_120"), (BF16, "sm_90")):
        codes = functions(machine_code(source, architecture), "_gemms")
        for name, index in KERNELS[source].items():
            (code,) = (code for full, code in codes.items() if f"ShapeILi{index}E" in full)
            loops = loops_of(code)
            rows.append([name, architecture, *loops[0], *loops[-1], *after_k(code, (CSRC / source).read_text())])
    said = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    release = re.search(r"V([\d.]+)", said)
    where = f"counted in what nvcc {release[1] if release else ''} compiles, not measured"
    found = Table("Instructions of a warp of the MoE kernels", where, "python benchmarks/fp4_slots.py", COLUMNS, rows)
    found.show(f"{found.what}\n({found.where})")
    if arguments.json:
        found.write(arguments.json, "slots")


if __name__ == "__main__":
    main()
