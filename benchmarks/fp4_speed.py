# SPDX-License-Identifier: Apache-2.0
"""A model of the experts layer's speed on SM 12.x cards, for many tokens. Nothing of it was measured there.

    python benchmarks/fp4_speed.py

A layer takes the longest of three times: of its products, at the published rate of the tensor cores' instruction; of
its instructions, at one a cycle for each of a multiprocessor's four schedulers (fp4_slots.py counts them); and of its
bytes, read and written once at the part of the bandwidth that an H100 reaches. What comes after K of a work tile is
added where no other block is there to multiply meanwhile. Experts get equally many tokens. A kernel rounds an expert's
tokens up to what its warps multiply at once; on average the multiprocessors wait for half a work tile at the end.
Splitting the input into terms is a pass before it. Launches, barriers, latencies and the router count nothing: the last
table says how far that is from what the BF16 kernels take on an H100.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fp4_tables import Table

ROOT = Path(__file__).resolve().parents[1]
EXPERTS, TOP_K, SIZE = 32, 4, 2880  # gpt-oss-20b: hidden and intermediate size
TOKENS = (512, 1024, 2048, 4096, 8192)
WEIGHT_BITS = 4.25  # with their scales
READ_OF_PUBLISHED = 0.86  # H100: 423 MB of weights in 146.6 us (docs/data/layer-20b-limit.json), of 3.35 TB/s
SCHEDULERS = 4  # of a multiprocessor, each issues an instruction a cycle
BF16_PRODUCT, FP4_PRODUCT = 2 * 16 * 8 * 16, 2 * 16 * 8 * 64  # FLOP of one instruction
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
    sass: str = "sm_120"  # whose machine code it runs


CARDS = (
    Card("RTX 5090", 170, 2.407, 1.79, 512, 4096, "published: BF16 209 TFLOP/s, FP4 1,676"),
    Card("RTX PRO 6000", 188, 2.617, 1.79, 1024, 4096, "published: BF16 504 TFLOP/s, FP4 2,015"),
    Card("GB10", 48, SMALL_CARD_CLOCK, 0.273, 512, 4096, "published: FP4 1,000 with sparsity; BF16 assumed as GeForce"),
)
# 1.83 GHz is the clock of the published 989 TFLOP/s; a product of m16n8k16 takes a scheduler 6 cycles by mma.sync.
H100 = Card("H100", 132, 1.83, 3.35, 4 * 4096 // 6, 0, "published clock and bandwidth; 6 cycles a product", "sm_90")


@dataclass(frozen=True)
class Kernel:
    """`terms` 0 for BF16. `at_once`: tokens that an expert's are rounded up to."""

    name: str
    terms: int
    tokens: int  # of a token block
    rows: int  # of a row block
    at_once: int
    warps: int
    blocks: int  # resident on a multiprocessor

    @property
    def bf16(self) -> bool:
        return self.terms == 0

    @property
    def activation_bytes(self) -> float:
        """Of one value of a product's input: BF16; or for 64 values 32 bytes a term and 16 of scales."""
        return 2 if self.bf16 else self.terms / 2 + 0.25

    def stage_bytes(self, k: int = 64) -> float:
        """That a block copies for so much of K: its weights and tokens."""
        return k * (self.rows * WEIGHT_BITS / 8 + self.tokens * self.activation_bytes)


def bf16_kernel(tokens_per_expert: float) -> Kernel:
    """As configs/tuning/default.json chooses (kernels/csrc/grouped/layer.cuh)."""
    rule = json.loads((ROOT / "configs/tuning/default.json").read_text())["rule"]
    grouped = [line for line in rule if line["kernel"].startswith("tokens")]
    name = next(each["kernel"] for each in grouped if tokens_per_expert <= each.get("tokens_per_expert", math.inf))
    tokens = int(name.removeprefix("tokens"))
    return Kernel(name, 0, tokens, *((256, 8, 8, 1) if tokens > 80 else (128, 8, 4, 3)))


def fp4_kernel(terms: int) -> Kernel:
    """The larger blocks of kernels/csrc/fp4/layer.cuh: two warps share tile rows and take turns with m16 tiles."""
    return Kernel(f"{terms} term{'s'[: terms > 1]}", terms, 128, 256, 32, 8, 1)


FP4_KERNELS = tuple(map(fp4_kernel, (1, 2, 3, 4)))


@dataclass(frozen=True)
class Cycles:
    """Of a work tile: what its products take the tensor cores, its instructions each of the schedulers."""

    tensor: float
    issue: float  # in the main loop
    after: float  # instructions after K

    def with_blocks(self, blocks: int) -> float:
        """After K the tensor cores wait, unless another block's warps have products."""
        if blocks == 1:
            return max(self.tensor, self.issue) + self.after
        return max(self.tensor, self.issue + self.after)


@cache
def counted(name: str, sass: str) -> dict[str, int]:
    """A kernel's row of docs/data/fp4-slots.json."""
    table = json.loads((ROOT / "docs/data/fp4-slots.json").read_text())
    (row,) = (row for row in table["rows"] if row[0] == name and row[1].startswith(sass))
    return dict(zip(table["columns"][2:], row[2:], strict=True))


def work_tile(card: Card, kernel: Kernel, tokens: int, down: int) -> Cycles:
    """Of a token block with so many tokens."""
    rate, flop = (card.bf16, BF16_PRODUCT) if kernel.bf16 else (card.fp4, FP4_PRODUCT)
    count, steps = counted(kernel.name, card.sass), SIZE / 64
    most, fewest = count["products of 64 along K"], count["products with fewest tokens"]
    products = 2 * tokens * kernel.rows * 64 * max(1, kernel.terms) / flop / kernel.warps  # of a warp
    beside = count["beside those"]
    beside += (count["beside them"] - beside) * (products - fewest) / (most - fewest)
    warps = kernel.warps / SCHEDULERS
    return Cycles(
        tensor=steps * warps * products * flop * SCHEDULERS / rate,
        issue=steps * warps * (products + beside),
        after=warps * count["after down" if down else "after gate_up"] * tokens / kernel.tokens,
    )


def over_a_layer(card: Card, kernel: Kernel, tokens: int, cycles: Callable[[Cycles], float]) -> float:
    """Microseconds of the work tiles, one after the other on each multiprocessor, and half of one at the end."""
    each = tokens * TOP_K / EXPERTS
    blocks = [kernel.tokens] * int(each // kernel.tokens)
    if each % kernel.tokens:
        blocks.append(math.ceil(each % kernel.tokens / kernel.at_once) * kernel.at_once)
    total = last = 0.0
    for down, rows in enumerate((2 * SIZE, SIZE)):
        taken = [cycles(work_tile(card, kernel, block, down)) for block in blocks]
        total += EXPERTS * sum(taken) * rows / kernel.rows
        last = max(taken)
    return (total / card.multiprocessors + last / 2) / card.gigahertz / 1e3


def byte_microseconds(card: Card, kernel: Kernel, tokens: int) -> tuple[float, float]:
    """Of the pass before, which splits the input, and of the layer."""
    rate = card.terabytes * READ_OF_PUBLISHED * 1e6  # bytes a microsecond
    values = tokens * SIZE
    split = 0.0 if kernel.bf16 else values * (2 + kernel.activation_bytes)
    layer = EXPERTS * 3 * SIZE * SIZE * WEIGHT_BITS / 8
    layer += values * (kernel.activation_bytes + 2)  # the input and the output
    layer += values * TOP_K * (2 * kernel.activation_bytes + 2 * 2)  # between the products; each expert's results
    return split / rate, layer / rate


def microseconds(card: Card, kernel: Kernel, tokens: int) -> float:
    split, layer = byte_microseconds(card, kernel, tokens)
    return split + max(over_a_layer(card, kernel, tokens, lambda tile: tile.with_blocks(kernel.blocks)), layer)


COMMAND = "python benchmarks/fp4_speed.py"


def speed() -> Table:
    rows: list[list[object]] = []
    for card in CARDS:
        for tokens in TOKENS:
            kernels = (bf16_kernel(tokens * TOP_K / EXPERTS), *FP4_KERNELS)
            times = [round(microseconds(card, kernel, tokens)) for kernel in kernels]
            rows.append([card.name, tokens, *times, *(f"{times[0] / times[terms]:.1f}" for terms in (2, 3, 4))])
    names = [kernel.name for kernel in FP4_KERNELS]
    columns = ["card", "tokens", "BF16", *names, *(f"BF16 / {name}" for name in names[1:])]
    what = "A model's microseconds of one gpt-oss-20b MoE layer"
    return Table(what, "computed from published rates, not measured", COMMAND, columns, rows)


def traffic() -> Table:
    """Of one multiprocessor that does nothing but multiply."""
    card = CARDS[0]
    rows: list[list[object]] = []
    for kernel in (bf16_kernel(math.inf), *FP4_KERNELS):
        tile, steps = work_tile(card, kernel, kernel.tokens, 0), SIZE / 64
        cycles = tile.tensor / steps
        # Each warp reads 64 rows (FP4) or 32 (BF16), and the tokens that it multiplies: half of them, or all.
        weights = (64 if not kernel.bf16 else 32) * WEIGHT_BITS / 8
        read = kernel.warps * 64 * (weights + kernel.tokens * (1 if kernel.bf16 else 0.5) * kernel.activation_bytes)
        copied = kernel.stage_bytes()
        part = tile.tensor / tile.with_blocks(kernel.blocks)
        name = "BF16" if kernel.bf16 else kernel.name
        issued = [round(cycles), round(tile.issue / steps), f"{part:.0%}"]
        rows.append([name, *issued, f"{copied / cycles:.1f}", f"{(copied + read) / cycles:.0f}"])
    columns = [
        "",
        "tensor cores' cycles for 64 of K",
        "cycles to issue all instructions",
        "of the rate, with what follows K of gate_up",
        "bytes a cycle from L2",
        "through shared memory",
    ]
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
