# SPDX-License-Identifier: Apache-2.0
"""Deliberate faults in the FP4 kernels, for kernels.py to build in beside the others."""

from __future__ import annotations

from tests.mutations.table import Mutation

CONFIG = "{3, 4, 64, 4, 2}"  # three terms: what needs another byte-id and another word of scales than the first
FP4 = "an FP4 layer against float64 on the same terms, in `test_kernel_mutations.py`"

PRODUCT = "mma_mxf4(Selector<TERM % 2 * 2, M % 2, N / 4 * 2, N % 4>{}, sums[N], a, w.b[N], scales, w.scales);"
OF_A_TERM = "multiply_term<M_TILES, TERM, 0>(S{}, sums, codes, stride, scales, w);"
WAIT = "cp_async_wait<S::STAGES - 3>();"

MUTATIONS = tuple(
    Mutation(name, f"fp4/{file}", old, new, FP4)
    for name, file, old, new in (
        # Which scale a product takes.
        ("byte-id of another term", "main_loop.cuh", PRODUCT, PRODUCT.replace("TERM % 2 * 2", "2 - TERM % 2 * 2")),
        ("thread-id of another m16 tile", "main_loop.cuh", PRODUCT, PRODUCT.replace(" M % 2", " 1 - M % 2")),
        ("byte-id of another tile row", "main_loop.cuh", PRODUCT, PRODUCT.replace("N / 4 * 2", "2 - N / 4 * 2")),
        ("thread-id of another row", "main_loop.cuh", PRODUCT, PRODUCT.replace("N % 4", "(N + 1) % 4")),
        (
            "terms 2 and 3 with the scales of 0 and 1",
            "main_loop.cuh",
            "TERM < 2 ? scales[M / 2].x : scales[M / 2].y",
            "scales[M / 2].x",
        ),
        ("scales of tokens g and g + 8 exchanged", "main_loop.cuh", "g + 8 * (lane & 1)", "g + 8 * (~lane & 1)"),
        ("one scale for 64 of K", "weights.cuh", "bytes[0][1] << 8", "bytes[0][0] << 8"),
        (
            "a block's scales to its neighbour",
            "epilogue.cuh",
            "scales[2 * q + second] = static_cast<uint8_t>(my_scale);",
            "scales[2 * q + 1 - second] = static_cast<uint8_t>(my_scale);",
        ),
        (
            "the next term's scale for each",
            "epilogue.cuh",
            "if (q == term) my_scale = scale;",
            "if (q == term - 1) my_scale = scale;",
        ),
        (
            "the second term's scale for the first",
            "fp4_layer.cu",
            "scales |= scale << 8 * term;",
            "scales |= scale << 8 * (term ^ 1);",
        ),
        # Which codes it multiplies.
        (
            "nibbles in the order of K",
            "terms.cuh",
            "c[2] | c[0] << 4 | c[3] << 16 | c[1] << 20",
            "c[0] | c[1] << 4 | c[2] << 16 | c[3] << 20",
        ),
        ("two nibbles exchanged", "terms.cuh", "c[0] << 8 | c[2] << 12", "c[2] << 8 | c[0] << 12"),
        ("signs of two weights lost", "weights.cuh", "select(LOWER_SIGN, w, v >> 6)", "v >> 6"),
        ("halves of K exchanged", "main_loop.cuh", "lane / 16 * S::PLANE_BYTES", "(1 - lane / 16) * S::PLANE_BYTES"),
        (
            "the first term for all",
            "main_loop.cuh",
            "codes + TERM * 2 * S::PLANE_BYTES + M * stride",
            "codes + M * stride",
        ),
        # Terms.
        ("the last term dropped", "main_loop.cuh", OF_A_TERM, f"if constexpr (TERM + 1 < S::TERMS) {OF_A_TERM}"),
        ("a term of all instead of the rest", "terms.cuh", "rest[i] = fmaf(-q.value, scale, rest[i]);", ";"),
        ("8 for what is above 7", "terms.cuh", "fminf((size + large) - large, 6.f)", "(size + large) - large"),
        ("a scale too small", "terms.cuh", "largest + 0x1fffffu", "largest + 0x0fffffu"),
        ("NaN becomes terms", "terms.cuh", "if (term == 0) bad = largest >= 0x7f800000u;", ";"),
        # K that is no multiple of 64, tokens, waits.
        ("the next token beyond K", "fp4_layer.cu", "exists && piece * 8 < H", "exists"),
        ("activations beyond K not cleared", "epilogue.cuh", "if (exists && last) at[CODE_BYTES / 4] = 0;", ";"),
        ("scales beyond K not cleared", "epilogue.cuh", "if (last) scales[2 * q + 1] = 0;", ";"),
        ("a warp's last m16 tile skipped", "epilogue.cuh", "m >= part.m_tiles", "m >= max(1, part.m_tiles - 1)"),
        (
            "the first expert's bias for all on terms",
            "epilogue.cuh",
            "static_cast<int64_t>(expert) * p.rows + row",
            "row",
        ),
        ("copies of terms not waited for", "main_loop.cuh", WAIT, WAIT.replace("3", "2")),
        (
            "down before its gate-up's terms",
            "fp4_layer.cu",
            "if (work.down) wait_for(p.finished + work.token_block, grouped::finished_warps<S>(p.gemms[0]));",
            ";",
        ),
    )
)
