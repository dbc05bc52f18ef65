# SPDX-License-Identifier: Apache-2.0
"""A model of the experts layer's speed on SM 12.x cards, for many tokens. Nothing of it was measured there.

    python benchmarks/fp4_speed.py

A layer takes the longer of two times: that of its products, at the published rate of the tensor cores' instruction, and
that of its bytes, read and written once at the part of the bandwidth that an H100 reaches. Experts get equally many
tokens. A kernel rounds an expert's tokens up to what its warps multiply at once; on average the multiprocessors wait
for half a work tile at the end. Splitting the input into terms is a pass before it. Launches, barriers and all other
instructions count nothing: the last table says how far that is from what the BF16 kernels take on an H100.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

from fp4_tables import Table

ROOT = Path(__file__).resolve().parents[1]
EXPERTS, TOP_K, SIZE = 32, 4, 2880  # gpt-oss-20b: hidden and intermediate size
TOKENS = (512, 1024, 2048, 4096, 8192)
WEIGHT_BITS = 4.25  # with their scales
READ_OF_PUBLISHED = 0.86  # H100: 423 MB of weights in 146.6 us (docs/data/layer-20b-limit.json), of 3.35 TB/s
SMALL_CARD_CLOCK = 2.44  # GHz, for 500 TFLOP/s of FP4: half of the petaflop with sparsity that NVIDIA says


@dataclass(frozen=True)
class Card:
    """`bf16`, `fp4`: FLOP of a multiprocessor and clock, by mma.sync with FP32 sums."""

    name: str
    multiprocessors: int
    gigahertz: float
    terabytes: float  # a second
    bf16: int
    fp4: int
    source: str


CARDS = (
    Card("RTX 5090", 170, 2.407, 1.79, 512, 4096, "published: BF16 209 TFLOP/s, FP4 1,676"),
    Card("RTX PRO 6000", 188, 2.617, 1.79, 1024, 4096, "published: BF16 504 TFLOP/s, FP4 2,015"),
    Card("GB10", 48, SMALL_CARD_CLOCK, 0.273, 512, 4096, "published: FP4 1,000 with sparsity; BF16 assumed as GeForce"),
)
# 1.83 GHz is the clock of the published 989 TFLOP/s; a product of m16n8k16 takes a scheduler 6 cycles by mma.sync.
H100 = Card("H100", 132, 1.83, 3.35, 4 * 4096 // 6, 0, "published clock and bandwidth; 6 cycles a product")


@dataclass(frozen=True)
class Kernel:
    """`terms` of gate_up and of down, 0 for BF16. `at_once`: tokens that an expert's are rounded up to."""

    name: str
    terms: tuple[int, int]
    tokens: int  # of a token block
    rows: int  # of a row block
    at_once: int

    @property
    def bf16(self) -> bool:
        return self.terms == (0, 0)

    def activation_bytes(self, down: int) -> float:
        """Of one value of a product's input: BF16; or for 64 values 32 bytes a term and 16 of scales."""
        return 2 if self.bf16 else self.terms[down] / 2 + 0.25

    def stage_bytes(self, k: int = 64) -> float:
        """That a block copies for so much of K: its weights and tokens."""
        return k * (self.rows * WEIGHT_BITS / 8 + self.tokens * self.activation_bytes(0))


def bf16_kernel(tokens_per_expert: float) -> Kernel:
    """As configs/tuning/default.json chooses (kernels/csrc/grouped/layer.cuh)."""
    rule = json.loads((ROOT / "configs/tuning/default.json").read_text())["rule"]
    grouped = [line for line in rule if line["kernel"].startswith("tokens")]
    name = next(each["kernel"] for each in grouped if tokens_per_expert <= each.get("tokens_per_expert", math.inf))
    tokens = int(name.removeprefix("tokens"))
    return Kernel("BF16", (0, 0), tokens, 256 if tokens > 80 else 128, 8)


def fp4_kernel(*terms: int) -> Kernel:
    """The larger blocks of kernels/csrc/fp4/layer.cuh: two warps share tile rows and take turns with m16 tiles."""
    both = (terms[0], terms[-1])
    return Kernel(" + ".join(map(str, dict.fromkeys(both))), both, 128, 256, 32)


FP4_KERNELS = tuple(fp4_kernel(*terms) for terms in ((1,), (2,), (3,), (4, 3), (4,)))


def flop_microseconds(card: Card, kernel: Kernel, tokens: int) -> float:
    each = tokens * TOP_K / EXPERTS
    blocks = [kernel.tokens] * int(each // kernel.tokens)
    if each % kernel.tokens:
        blocks.append(math.ceil(each % kernel.tokens / kernel.at_once) * kernel.at_once)
    rate = card.bf16 if kernel.bf16 else card.fp4  # of a multiprocessor
    cycles = last = 0.0
    for down, rows in enumerate((2 * SIZE, SIZE)):
        per_row = 2 * SIZE * max(1, kernel.terms[down]) / rate
        cycles += EXPERTS * sum(blocks) * rows * per_row
        last = max(blocks) * kernel.rows * per_row
    return (cycles / card.multiprocessors + last / 2) / card.gigahertz / 1e3


def byte_microseconds(card: Card, kernel: Kernel, tokens: int) -> tuple[float, float]:
    """Of the pass before, which splits the input, and of the layer."""
    rate = card.terabytes * READ_OF_PUBLISHED * 1e6  # bytes a microsecond
    values = tokens * SIZE
    split = 0.0 if kernel.bf16 else values * (2 + kernel.activation_bytes(0))
    layer = EXPERTS * 3 * SIZE * SIZE * WEIGHT_BITS / 8
    layer += values * (kernel.activation_bytes(0) + 2)  # the input and the output
    layer += values * TOP_K * (2 * kernel.activation_bytes(1) + 2 * 2)  # between the products; each expert's results
    return split / rate, layer / rate


def microseconds(card: Card, kernel: Kernel, tokens: int) -> float:
    split, layer = byte_microseconds(card, kernel, tokens)
    return split + max(flop_microseconds(card, kernel, tokens), layer)


COMMAND = "python benchmarks/fp4_speed.py"


def speed() -> Table:
    rows: list[list[object]] = []
    for card in CARDS:
        for tokens in TOKENS:
            kernels = (bf16_kernel(tokens * TOP_K / EXPERTS), *FP4_KERNELS)
            times = [round(microseconds(card, kernel, tokens)) for kernel in kernels]
            rows.append([card.name, tokens, *times, f"{times[0] / times[3]:.1f}, {times[0] / times[4]:.1f}"])
    columns = [
        "card",
        "tokens",
        "BF16",
        *(f"{kernel.name} term{'s'[: kernel.terms[0] > 1]}" for kernel in FP4_KERNELS),
        "BF16 / 3, BF16 / 4 + 3",
    ]
    what = "A model's microseconds of one gpt-oss-20b MoE layer; 4 + 3: four terms for gate_up, three for down"
    return Table(what, "computed from published rates, not measured", COMMAND, columns, rows)


def traffic() -> Table:
    """Of one multiprocessor that does nothing but multiply."""
    card = CARDS[0]
    rows: list[list[object]] = []
    for kernel in (bf16_kernel(math.inf), *FP4_KERNELS):
        terms = max(1, kernel.terms[0])
        rate = card.bf16 if kernel.bf16 else card.fp4
        cycles = 2 * kernel.tokens * kernel.rows * 64 * terms / rate
        # Each warp reads 64 rows (FP4) or 32 (BF16), and the tokens that it multiplies: half of them, or all.
        warps = 8
        weights = (64 if not kernel.bf16 else 32) * WEIGHT_BITS / 8
        read = warps * 64 * (weights + kernel.tokens * (1 if kernel.bf16 else 0.5) * kernel.activation_bytes(0))
        copied = kernel.stage_bytes()
        rows.append([kernel.name, round(cycles), f"{copied / cycles:.1f}", f"{(copied + read) / cycles:.0f}"])
    columns = ["terms of gate_up (and down)", "cycles for 64 of K", "bytes a cycle from L2", "through shared memory"]
    where = "computed for the rates of an RTX 5090, whose shared memory has 128 bytes a cycle"
    return Table("A full work tile on one multiprocessor", where, COMMAND, columns, rows)


def check() -> Table:
    measured = json.loads((ROOT / "docs/data/layer-20b-limit.json").read_text())
    times = {row[0]: row[measured["columns"].index("native")] for row in measured["rows"]}
    rows: list[list[object]] = []
    for tokens in TOKENS:
        modelled = microseconds(H100, bf16_kernel(tokens * TOP_K / EXPERTS), tokens)
        rows.append([tokens, round(modelled), times[tokens], f"{modelled / times[tokens]:.2f}"])
    columns = ["tokens", "modelled", "measured", "modelled / measured"]
    return Table("The same model for the BF16 kernels on an H100", measured["where"], COMMAND, columns, rows)


TABLES = {"speed": speed, "traffic": traffic, "check": check}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=Path, metavar="FOLDER", help="each table as fp4-NAME.json, as docs/data has them"
    )
    arguments = parser.parse_args()
    for name, make in TABLES.items():
        found = make()
        found.show(f"{found.what}\n({found.where})")
        if arguments.json:
            found.write(arguments.json, name)


if __name__ == "__main__":
    main()
