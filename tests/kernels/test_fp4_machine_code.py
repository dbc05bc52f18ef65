# SPDX-License-Identifier: Apache-2.0
"""The FP4 kernels in the CUDA library: compiled for SM 12.x alone, and in their main loops what the design says."""

from __future__ import annotations

import ast
import re
import runpy
import shutil
from pathlib import Path

import fp4_slots
import fp4_speed
import pytest

from tests.kernels.building import KERNELS, in_a_new_process, run
from tests.kernels.test_machine_code import FP4, MAX_SHARED_BYTES, all_resources, foreign, machine_code

# (terms, most m16 tiles of a warp) by the table's order. A main loop for each number of m16 tiles has, for a step of 64
# along K, eight products of each and of each term.
CONFIGURATIONS = [(terms, tiles) for terms in (1, 2, 3, 4) for tiles in (2, 4)]


def kernels(library: Path) -> dict[str, str]:
    """Name -> SASS of the GEMMs."""
    (text,) = machine_code(library, fp4=True).values()
    parts = re.split(r"\bFunction : (\w+)\n", text)
    return {name: code for name, code in zip(parts[1::2], parts[2::2], strict=True) if "fp4_gemms" in name}


def test_products_of_the_main_loops(library: Path):
    found = kernels(library)
    assert len(found) == len(CONFIGURATIONS)
    for index, (terms, tiles) in enumerate(CONFIGURATIONS):
        (code,) = (code for name, code in found.items() if f"ShapeILi{index}E" in name)
        products = len(re.findall(r"\bOMMA\.SF\.16864\.F32\.E2M1\.E2M1\.E8\b", code))
        assert products == sum(8 * terms * m for m in range(1, tiles + 1)), (index, products)
        assert "HMMA" not in code, "no decoded weights"


def test_the_model_of_speed_counts_these_instructions(library: Path):
    """docs/data/fp4-slots.json has the main loops'. Another nvcc may need a few more or less."""
    (fp4,), others = machine_code(library, fp4=True).values(), machine_code(library, fp4=False)
    for source, architecture, text in (
        (fp4_slots.FP4, "sm_120", fp4),
        (fp4_slots.BF16, "sm_120", others["sm_120"]),
        (fp4_slots.BF16, "sm_90", others["sm_90"]),
    ):
        codes = fp4_slots.functions(text, "_gemms")
        for name, index in fp4_slots.KERNELS[source].items():
            (code,) = (code for full, code in codes.items() if f"ShapeILi{index}E" in full)
            most, *_, fewest = fp4_slots.loops_of(code)
            assert [*most, *fewest] == pytest.approx([*fp4_speed.counted(name, architecture).values()][:4], rel=0.05)


def test_no_spills_and_what_a_block_takes(library: Path):
    used = {name: use for (_, name), use in all_resources(library).items() if FP4 in name}
    assert len(used) == len(CONFIGURATIONS) + 4  # and activations to one, two, three, four terms
    assert [name for name, use in used.items() if use["STACK"] or use["LOCAL"]] == []
    for name, use in used.items():
        assert use["REG"] <= 255, name
    (text,) = machine_code(library, fp4=True).values()
    assert re.findall(r"\b(?:LDL|STL)\b.*", text) == []
    assert {name.split(".")[0] for name in foreign(text)} <= {"OMMA"}


def test_cards_by_themselves(tmp_path: Path):
    """As a compiler without families builds for them. One kernel: all of them take a quarter of a minute for each card.

    For 120a nvcc 13.0 makes the same machine code as for 120f, of all of them.
    """
    if (nvcc := runpy.run_path(str(KERNELS / "setup.py"))["nvcc"]()) is None:
        pytest.skip("nvcc isn't here to compile with")
    sources = shutil.copytree(KERNELS / "csrc", tmp_path / "csrc")
    layer = sources / "fp4" / "layer.cuh"
    table = re.compile(r"(CONFIGS\[\] = \{).*?\};", re.DOTALL)
    layer.write_text(table.sub(r"\1{4, 8, 128, 3, 1}};", layer.read_text(), count=1))
    cards = [f"-gencode=arch=compute_{card},code=sm_{card}" for card in ("120a", "121a")]
    options = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "--threads=2", *cards)
    run(nvcc, *options, "-c", sources / "fp4" / "fp4_layer.cu", "-o", tmp_path / "fp4.o")
    texts, used = machine_code(tmp_path / "fp4.o", fp4=True), all_resources(tmp_path / "fp4.o")
    assert texts.keys() == {"sm_120a", "sm_121a"} == {card for card, _ in used}
    assert all(not use["STACK"] and not use["LOCAL"] and use["REG"] <= 255 for use in used.values()), used
    for text in texts.values():
        assert text.count("OMMA.SF.16864.F32.E2M1.E2M1.E8") == sum(8 * 4 * tiles for tiles in (1, 2, 3, 4))
        assert {name.split(".")[0] for name in foreign(text)} == {"OMMA"} and "HMMA" not in text


def test_the_table_s_shared_memory(library: Path):
    said = in_a_new_process(
        library,
        """
from vllm_mxfp4_sm120.backends.native import fp4
library.load()
print([vars(c) for c in fp4.configurations()])
print(torch.ops.mxfp4_sm120.fp4_architectures(), *map(fp4.why_not, ((12, 0), (12, 1), (9, 0))), sep="|")
""",
    )
    table, words = said.stdout.splitlines()
    configurations = ast.literal_eval(table)
    assert [(config["terms"], config["tokens"] // 32) for config in configurations] == CONFIGURATIONS, said.stderr
    for config in configurations:
        blocks = 2 if config["tokens"] == 64 else 1
        assert config["shared_bytes"] * blocks + 1024 * (blocks - 1) <= MAX_SHARED_BYTES, config
        assert config["threads"] == 2 * config["tokens"]
    assert words.split("|") == ["120f-real", "None", "None", "the FP4 kernels are built for 120f-real, not for sm_90"]
