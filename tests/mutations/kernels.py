# SPDX-License-Identifier: Apache-2.0
"""Deliberate faults in the native kernels, all of them built into one library for the emulator, one switched on."""

from __future__ import annotations

import ctypes
import re
import shutil
from pathlib import Path

from tests.kernels.emulated import CSRC, build
from tests.mutations import fp4
from tests.mutations.table import Mutation

PACKAGE = "csrc"
SUITE = "conformance"

DENSE = "a linear layer against float64, in `test_kernel_mutations.py`"

WAIT = "cp_async_wait<STAGES - 2>();"
LARGEST = "fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3])))"

# Expressions, and statements with their semicolon.
MUTATIONS = (
    Mutation("copies not waited for", "grouped/main_loop.cuh", WAIT, "cp_async_wait<STAGES - 1>();", SUITE),
    Mutation(
        "a barrier before one's own copies have landed",
        "grouped/main_loop.cuh",
        f"{WAIT}\n        __syncthreads();",
        f"__syncthreads(); {WAIT}",
        SUITE,
    ),
    Mutation(
        "down before its gate-up",
        "grouped/loader.cuh",
        "if (work.down) wait_for(p.finished + work.token_block, finished_warps<S>(p.gemms[0]));",
        ";",
        SUITE,
    ),
    Mutation(
        "tokens read beyond a stage",
        "grouped/scheduler.cuh",
        "S::COLUMN_GROUPS - column_groups",
        "S::COLUMN_GROUPS",
        SUITE,
    ),
    Mutation("a tail of one token skipped", "grouped/scheduler.cuh", "mine == 0", "mine < 2", SUITE),
    Mutation("a tail's last token skipped", "grouped/epilogue.cuh", "8 * n + c < end", "8 * n + c < end - 1", SUITE),
    Mutation(
        "the first expert's bias for all",
        "grouped/epilogue.cuh",
        "static_cast<int64_t>(expert) * p.rows + row",
        "row",
        SUITE,
    ),
    Mutation("neighbours share two outputs' exponent", "common/pack.cuh", LARGEST, "fmaxf(fabsf(v[0]), 1.f)", SUITE),
    Mutation("finished blocks not forgotten", "grouped/grouping.cu", "ws.finished[tile] = 0;", ";", SUITE),
    Mutation("taken work tiles not forgotten", "grouped/grouping.cu", "if (i == 0) *ws.taken = 0;", ";", SUITE),
    Mutation("slots elsewhere keep an earlier call's place", "grouped/grouping.cu", "ws.position[s] = -1;", ";", SUITE),
    Mutation(
        "half of the gates ignored",
        "grouped/grouping.cu",
        "add_four(hi, {v[j].z, v[j].w}, weight[j]);",
        "add_four(hi, {v[j].z, v[j].w}, 1.f);",
        SUITE,
    ),
    Mutation("stale activations", "decode/epilogue.cuh", "act[i] = uint4{0, 0, 0, 0};", ";", SUITE),
    Mutation("stale results", "decode/decode_layer.cu", "if (has(j)) *y(j) = uint4{0, 0, 0, 0};", ";", SUITE),
    Mutation(
        "a group's last token skipped",
        "decode/routing_table.cuh",
        "column < group[t].columns",
        "column < group[t].columns - (group[t].columns > 1)",
        SUITE,
    ),
    Mutation(
        "expert map turned around",
        "common/routing.cuh",
        "args.expert_map[expert]",
        "args.expert_map[args.num_experts - 1 - expert]",
        SUITE,
    ),
    Mutation(
        "ids below zero pass",
        "common/routing.cuh",
        "static_cast<unsigned>(expert) >= static_cast<unsigned>(args.local_experts)",
        "expert >= args.local_experts",
        SUITE,
    ),
    Mutation("an expert chosen twice counts once", "common/routing.cuh", "sum += w;", ";", SUITE),
    Mutation("equal logits to the higher id", "common/routing.cuh", "__ffs(has) - 1", "31 - __builtin_clz(has)", SUITE),
    Mutation("gate not clamped", "common/activation.cuh", "gate = min_nan(gate, a.limit);", ";", SUITE),
    Mutation(
        "NaN swallowed",
        "common/activation.cuh",
        "return gate * sigmoid(a.alpha * gate) * (up + a.shift);",
        "return isnan(gate) ? 0.f : gate * sigmoid(a.alpha * gate) * (up + a.shift);",
        SUITE,
    ),
    Mutation(
        "scales of other rows",
        "common/weight_tile.cuh",
        "scales_of_rows(t.scales, m)",
        "scales_of_rows(t.scales, 0)",
        SUITE,
    ),
    Mutation(
        "a linear layer's copies not waited for",
        "dense/tiled.cu",
        "cp_async_wait<STAGES - 2>();",
        "cp_async_wait<STAGES - 1>();",
        DENSE,
    ),
    Mutation("the first scale for both halves of a step", "dense/tiled.cu", "pair >> 16", "pair", DENSE),
    Mutation(
        "a queue's copies not waited for",
        "dense/linear.cu",
        "cp_async_wait<S::AHEAD - 1>();",
        "cp_async_wait<S::AHEAD>();",
        DENSE,
    ),
    Mutation("INT8 without its sign", "dense/weights.cuh", "word ^ 0x80808080u", "word", DENSE),
    Mutation("the last part of K not added", "dense/tiled.cu", "part < split.parts", "part < split.parts - 1", DENSE),
    *fp4.MUTATIONS,
)


def build_with_faults(directory: Path) -> ctypes.CDLL:
    """The kernels with all of these; `switch_on` chooses."""
    csrc = directory / "csrc"
    shutil.copytree(CSRC, csrc)
    for number, mutation in reversed([*enumerate(MUTATIONS)]):  # longer ones before those that they contain
        path = csrc / mutation.module
        text = path.read_text()
        assert mutation.old in text, f"{mutation.name}: {mutation.old!r} isn't in {mutation.module}"
        on = f"emu::fault == {number}"
        either = (
            f"if ({on}) {{ {mutation.new} }} else {{ {mutation.old} }}"
            if mutation.old.endswith(";")
            else f"({on} ? ({mutation.new}) : ({mutation.old}))"
        )
        path.write_text(text.replace(mutation.old, either))
    # Of the FP4 kernels the configuration that is tried alone: compiling all eight takes longer than trying the faults.
    path = csrc / "fp4/layer.cuh"
    text, found = re.subn(r"(CONFIGS\[\] = \{).*?\n\};", rf"\1{fp4.CONFIG}}};", path.read_text(), flags=re.DOTALL)
    assert found == 1, f"no configurations in {path.name}"
    path.write_text(text)
    return build(csrc, arch=1200)


def switch_on(library: ctypes.CDLL, mutation: Mutation | None) -> None:
    library.switch_on(-1 if mutation is None else MUTATIONS.index(mutation))
