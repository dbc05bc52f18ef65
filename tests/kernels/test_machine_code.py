# SPDX-License-Identifier: Apache-2.0
"""What is in the CUDA library: every kernel for every card, no spills, only instructions that every card has.

It is compiled once, by kernels/build.sh, for the oldest card, for the one it is measured on, and for the two it is for.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest
from filelock import FileLock

from tests.kernels.building import ARCHITECTURES, cuobjdump, in_a_new_process, run

# What one block may have on sm_86, sm_89 and SM 12.x (CUDA C++ Programming Guide, technical specifications): an SM
# has 100 KB and the system keeps 1 per block. A100, H100 and B200 allow more; what stays within this runs on all.
MAX_SHARED_BYTES = 99 * 1024

# SASS for what every card from sm_80 can do: anything else fails, wgmma (HGMMA, WARPGROUP), tcgen05 (UTCHMMA, LDTM),
# tensor TMA (UTMALDG), setmaxnreg (USETMAXREG), SM120a's block-scaled mma (OMMA, QMMA) and clusters (UCGABAR, MAPA)
# among it. If a new compiler spells something harmless in a new way, see that SM 12.x has it and add it.
PORTABLE = {
    "integers, newer cards' uniform datapath included": """
        IMAD IADD IADD3 ISETP LOP3 PLOP3 SHF LEA SEL MOV PRMT POPC IABS IMNMX VIADD VIMNMX VIMNMX3 VIADDMNMX FLO BREV
        SGXT BMSK LEPC R2P P2R I2F I2FP F2I FRND CS2R S2R S2UR R2UR UMOV UIADD3 UIMAD UISETP ULEA ULOP3 UPLOP3 UPOPC
        UPRMT
        USEL USHF USGXT UFLO UBMSK UBREV UP2UR UR2UP UVIADD UVIMNMX UI2F UI2FP UF2I UFADD UFMUL UFFMA UFSETP UFSEL""",
    "floats": """
        FADD FMUL FFMA FSETP FSEL FMNMX FMNMX3 FCHK FADD2 FMUL2 FFMA2 MUFU F2F F2FP HADD2 HMUL2 HFMA2 HSETP2 HSET2
        HMNMX2""",
    "memory; LDGSTS is cp.async": """
        LDG STG LDS STS LD ST LDC LDCU ULDC LDSM ATOM ATOMG ATOMS RED REDG LDGSTS LDGDEPBAR DEPBAR CCTL MEMBAR ERRBAR
        CGAERRBAR FENCE""",
    "control and warps; B2R is what a barrier that also votes answers": """
        BRA BRX BRXU JMP CALL RET EXIT BSSY BSYNC BREAK WARPSYNC NANOSLEEP NOP YIELD BAR B2R VOTE VOTEU SHFL MATCH REDUX
        CREDUX
        ELECT ENDCOLLECTIVE KILL BPT BMOV""",
    "mma.sync": "HMMA",
    "mbarriers, and from sm_90 on, SM 12.x included, bulk copies and dependent launches": """
        SYNCS ARRIVES UBLKCP UBLKPF PREEXIT ACQBULK""",
}
ALLOWED = frozenset(" ".join(PORTABLE.values()).split())


def foreign(sass: str) -> set[str]:
    """The instructions of a SASS listing that are not on every card, with their modifiers."""
    found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)", sass, re.MULTILINE)
    # A bulk copy to several blocks of a cluster needs what SM 12.x lacks.
    return {name + modifiers for name, modifiers in found if name not in ALLOWED or "MULTICAST" in modifiers}


FP4 = "3fp4"  # their namespace, in a kernel's name


@pytest.fixture(scope="session")
def resources(library: Path) -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, kernel) -> what the compiler gave it: REG, STACK, SHARED, LOCAL."""
    return {key: use for key, use in all_resources(library).items() if FP4 not in key[1]}


@functools.cache
def all_resources(library: Path) -> dict[tuple[str, str], dict[str, int]]:
    """Those of the FP4 kernels too, which are in a part of the library with its own architectures."""
    found = {}
    arch = kernel = ""
    for line in run(cuobjdump(), "--dump-resource-usage", library).stdout.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            kernel = match[1]
        elif "REG:" in line:
            found[arch, kernel] = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
    return found


@pytest.fixture(scope="session")
def sass(library: Path) -> dict[str, str]:
    """Architecture -> its machine code, as text."""
    return machine_code(library, fp4=False)


@functools.cache
def disassembled(library: Path) -> tuple[str, ...]:
    """Each file in the library, from its architecture on. It takes a quarter of a minute, so one process does it."""
    listing = library.with_suffix(".sass")
    with FileLock(f"{listing}.lock"):
        if not listing.exists():
            listing.write_text(run(cuobjdump(), "--dump-sass", library).stdout)
    return tuple(listing.read_text().split("\narch = ")[1:])


@functools.cache
def machine_code(library: Path, fp4: bool) -> dict[str, str]:
    """Of the FP4 kernels or of all others."""
    texts: dict[str, str] = {}
    for part in disassembled(library):
        if ("fp4_gemms" in part) == fp4:
            arch = part.split(maxsplit=1)[0]
            texts[arch] = texts.get(arch, "") + part
    return texts


def test_every_kernel_is_compiled_for_every_architecture(resources):
    kernels = {arch: {kernel for a, kernel in resources if a == arch} for arch in ARCHITECTURES}
    assert {arch for arch, _ in resources} == ARCHITECTURES
    assert kernels["sm_80"] and all(names == kernels["sm_80"] for names in kernels.values())


def test_no_kernel_spills_or_has_a_stack_frame(resources, sass):
    """Both go through local memory, that is, through the cache and past it: weights that stream past are slowed."""
    framed = {key: use for key, use in resources.items() if use["STACK"] or use["LOCAL"]}
    assert framed == {}
    for arch, text in sass.items():
        assert re.findall(r"\b(?:LDL|STL)(?:\.\w+)*\b.*", text) == [], arch


def test_no_block_has_more_shared_memory_than_sm120_gives(library: Path, resources):
    """The GEMMs' shared memory is dynamic: the library lists it. Beside it they may have static memory."""
    # As sm_80 counts it: from sm_90 on, the system's 1 KB is included.
    static = {kernel: use["SHARED"] for (arch, kernel), use in resources.items() if arch == "sm_80"}
    gemms = [size for kernel, size in static.items() if re.search("decode_layer|grouped_gemm", kernel)]
    said = in_a_new_process(library, "library.load(); print([vars(c) for c in library.configurations()])")
    assert said.returncode == 0, said.stderr
    configurations = ast.literal_eval(said.stdout)
    assert len({config["name"] for config in configurations}) == len(configurations) == 9
    for config in configurations:
        dynamic = config["shared_bytes"]
        assert dynamic + max(gemms) <= MAX_SHARED_BYTES, f"{config}: {dynamic} dynamic, {max(gemms)} static bytes"
        assert 32 <= config["threads"] <= 1024 and config["threads"] % 32 == 0
    assert max(static.values()) <= MAX_SHARED_BYTES


# Of a thread, at most, by weights and, of the streaming ones, m16 tiles of tokens. With 8 warps 255, with 12 warps 168
# are all there are, and what a kernel asks for beyond spills.
DENSE_REGISTERS = {
    "linear.*Bf16ELi16": 128,  # two blocks a multiprocessor
    "linear.*Bf16ELi32": 176,
    "linear.*Int8ELi8E": 128,
    "linear.*Int8ELi16ELi[35]": 128,
    "linear.*Int8ELi16ELi8": 216,
    "linear.*Int8ELi32": 240,
    "tiled": 184,
    "dequantize": 64,
}


def test_what_a_block_of_the_dense_kernels_takes(library: Path, resources):
    for name, most in DENSE_REGISTERS.items():
        found = {key: use["REG"] for key, use in resources.items() if re.search(name, key[1])}
        assert {arch for arch, _ in found} == ARCHITECTURES and max(found.values()) <= most, (name, found)
    said = in_a_new_process(
        library,
        """
from vllm_mxfp4_sm120.dense import native
library.load()
print([list(vars(config).values()) for config in native.configurations()])
""",
    )
    assert said.returncode == 0, said.stderr
    table = {name: rest for name, *rest in ast.literal_eval(said.stdout)}
    assert len(table) == 11 and max(rest[-1] for rest in table.values()) <= MAX_SHARED_BYTES
    for name, rest in {
        "bf16_rows24_tokens16": [False, 16, 256, 79872],
        "bf16_rows40_tokens32": [False, 32, 256, 92160],
        "int8_rows40_tokens8": [True, 8, 256, 54272],
        "int8_rows64_tokens16": [True, 16, 256, 88064],
        "int8_128x64": [True, 64, 128, 84480],
    }.items():
        assert table[name] == rest


def test_only_instructions_that_every_card_has(sass):
    assert set(sass) == ARCHITECTURES
    for arch, text in sass.items():
        assert "HMMA.16816.F32.BF16" in text, f"{arch}: no tensor core instruction: is this the kernels' code?"
        assert foreign(text) == set(), arch


def test_a_foreign_instruction_is_noticed():
    line = "        /*0a{}0*/              {}{} R4, R8 ;   /* 0x000 */\n"
    portable = ("HMMA.16816.F32.BF16", "UBLKCP.S.G", "LDGSTS.E.BYPASS.128", "SYNCS.ARRIVE.TRANS64")
    alien = (
        "HGMMA.64x8x16.F32.BF16",
        "UTCHMMA",
        "UTMALDG.2D",
        "UBLKCP.MULTICAST",
        "USETMAXREG.DEALLOC.CTAPOOL",
        "OMMA.SF",
    )
    listing = "".join(line.format(i, "@!P0 " if i % 2 else "", name) for i, name in enumerate(portable + alien))
    assert foreign(listing) == set(alien)
