# SPDX-License-Identifier: Apache-2.0
"""Deliberate faults in a backend: the plain path's, for all that a backend must do is there in a few lines."""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from types import ModuleType

import pytest

from tests.mutations.table import Mutation
from vllm_mxfp4_sm120.backends.base import Backend

PACKAGE = "vllm_mxfp4_sm120"
# What `Tiled` is made of, each after what it imports.
CHAIN = ("mxfp4", "moe", "routing", "backends.base", "backends.eager", "backends.tiled")
# All of them before any is built anew, for what is imported meanwhile stays.
ORIGINALS = {name: import_module(f"{PACKAGE}.{name}") for name in CHAIN}
# Made once: cases and faulty modules must mean the same by them.
SHARED = ("Activation", "MoEShape", "MoEWeights")

PROOF, SUITE = "proof", "conformance"
ACTIVATE = "gate, up = gate_up[..., ::2], gate_up[..., 1::2]"
EXPERT = "codes, scales = codes[expert], scales[expert]"
PAIRS = "torch.zeros(topk_ids.numel(), x.shape[1], dtype=torch.float32, device=x.device)"
SORTED = "values, ids = logits.masked_fill(logits.isnan(), torch.nan).sort(dim=-1, descending=True, stable=True)"
CHOSEN = "values[:, :top_k].softmax(dim=-1)"
ON_CPU = "x = x.to(x.dtype if x.is_cuda else torch.float32)"
GATE, UP = "gate.clamp(max=SWIGLU_LIMIT)", "up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)"
PLACES = "pairs.index_copy_(0, grouped.order[rows]"
IN_BF16 = (
    "for i in range(0, x.shape[1], 32):\n"
    "            out.copy_((out + x[:, i : i + 32] @ tile.T[i : i + 32]).bfloat16())"
)

MUTATIONS = (
    Mutation(
        "high nibble first",
        "mxfp4",
        "values[byte & 15], values[byte >> 4]",
        "values[byte >> 4], values[byte & 15]",
        PROOF,
    ),
    Mutation("scales off by one", "mxfp4", "SCALE_BIAS = 127", "SCALE_BIAS = 128", PROOF),
    Mutation("the subnormal code is zero", "mxfp4", "(0.0, 0.5, 1.0", "(0.0, 0.0, 1.0", PROOF),
    Mutation("one code's sign lost", "mxfp4", "-4.0, -6.0)", "-4.0, 6.0)", PROOF),
    Mutation(
        "scales of the next block",
        "backends.tiled",
        "scales[rows, in_blocks])",
        "scales[rows, in_blocks].roll(1, -1))",
        PROOF,
    ),
    Mutation(
        "scales of another expert",
        "backends.tiled",
        EXPERT,
        EXPERT.replace("scales[expert]", "scales[expert - 1]"),
        PROOF,
    ),
    Mutation("experts exchanged", "backends.tiled", EXPERT, EXPERT.replace("expert]", "expert - 1]"), PROOF),
    Mutation("gate and up exchanged", "moe", ACTIVATE, "up, gate = gate_up[..., ::2], gate_up[..., 1::2]", PROOF),
    Mutation("gate and up in halves", "moe", ACTIVATE, "gate, up = gate_up.chunk(2, -1)", PROOF),
    Mutation("first bias dropped", "backends.tiled", "weights.w13_bias, expert", "None, expert", PROOF),
    Mutation("second bias dropped", "backends.tiled", "weights.w2_bias, expert", "None, expert", PROOF),
    Mutation("another expert's bias", "backends.tiled", "out += bias[expert]", "out += bias[expert - 1]", PROOF),
    Mutation("gate not clamped", "moe", GATE, "gate", SUITE),
    Mutation("up not clamped", "moe", UP, "up", SUITE),
    Mutation("up clamped above alone", "moe", UP, "up.clamp(max=SWIGLU_LIMIT)", SUITE),
    Mutation("alpha of plain SiLU", "moe", "SWIGLU_ALPHA = 1.702", "SWIGLU_ALPHA = 1.0", PROOF),
    Mutation("up without 1", "moe", "(SWIGLU_ALPHA * gate) * (up + 1)", "(SWIGLU_ALPHA * gate) * up", PROOF),
    Mutation("SiLU taken for SwiGLU", "moe", "if activation is Activation.SILU:", "if False:", SUITE),
    Mutation("expert map forgotten", "routing", "if expert_map is not None:", "if False:", PROOF),
    Mutation("expert map off by one", "routing", "expert_map[torch.where", "expert_map.roll(1)[torch.where", PROOF),
    Mutation(
        "negative ids wrap around",
        "routing",
        "known = (ids >= 0) & (ids",
        "known = (ids >= -expert_map.numel()) & (ids",
        SUITE,
    ),
    Mutation("ids in 16 bits", "routing", "ids = topk_ids.long()", "ids = topk_ids.short().long()", SUITE),
    Mutation("ids in 32 bits", "routing", "ids = topk_ids.long()", "ids = topk_ids.int().long()", SUITE),
    Mutation("ids without an upper bound", "routing", "(ids < local_experts)", "(ids < 1 << 20)", SUITE),
    Mutation(
        "an expert's last token skipped",
        "backends.eager",
        "slice(segment.start, segment.stop)",
        "slice(segment.start, segment.stop - (segment.stop > segment.start + 1))",
        PROOF,
    ),
    Mutation("softmax before top-k", "moe", CHOSEN, "values.softmax(dim=-1)[:, :top_k]", PROOF),
    Mutation("sigmoid for softmax", "moe", CHOSEN, "values[:, :top_k].sigmoid()", PROOF),
    Mutation("one expert too few", "moe", CHOSEN, f"{CHOSEN} * (torch.arange(top_k) != max(1, top_k - 1))", PROOF),
    Mutation("gates ignored", "backends.eager", ".mul_(grouped.routing.gate[rows, None])", "", PROOF),
    Mutation("gates in the order before the sort", "routing", "self.gate[order]", "self.gate", PROOF),
    Mutation(
        "the last block of K skipped",
        "backends.tiled",
        ON_CPU,
        "x = torch.nn.functional.pad(x.float()[:, :-32], (0, 32))",
        PROOF,
    ),
    Mutation(
        "a tile's last row skipped",
        "backends.tiled",
        "slice(row, row + TILE_ROWS)",
        "slice(row, row + TILE_ROWS - 1)",
        SUITE,
    ),
    Mutation("rows within an expert turned around", "backends.eager", PLACES, f"{PLACES}.flip(0)", PROOF),
    Mutation(
        "stale output", "backends.eager", PAIRS, f'vars(self).setdefault(f"{{topk_ids.numel()}}", {PAIRS})', SUITE
    ),
    Mutation("uninitialised output", "backends.eager", PAIRS, f"{PAIRS} + 1e30", PROOF),
    Mutation("sums in BF16", "backends.tiled", "out.addmm_(x, tile.T)", IN_BF16, SUITE),
    Mutation("output not rounded", "backends.eager", ".sum(1).to(x.dtype)", ".sum(1)", PROOF),
    Mutation("NaN swallowed", "moe", GATE, f"{GATE}.nan_to_num(SWIGLU_LIMIT)", SUITE),
    Mutation(
        "NaN spreads to other tokens",
        "backends.eager",
        ".sum(1).to(x.dtype)",
        ".sum(1).add(x.sum() * 0).to(x.dtype)",
        SUITE,
    ),
    Mutation("a NaN logit is never chosen", "moe", SORTED, SORTED.replace("torch.nan", "-1e30"), SUITE),
    Mutation(
        "equal logits to the higher id",
        "moe",
        SORTED,
        SORTED.replace("torch.nan)", "torch.nan).flip(-1)") + "\n    ids = router_logits.shape[1] - 1 - ids",
        SUITE,
    ),
    Mutation(
        "logits in BF16",
        "moe",
        SORTED,
        SORTED.replace("logits.masked_fill", "logits.bfloat16().float().masked_fill"),
        SUITE,
    ),
    Mutation("large inputs saturate", "backends.tiled", ON_CPU, "x = x.float().clamp(-448, 448)", SUITE),
    Mutation("tiny inputs flushed", "backends.tiled", ON_CPU, "x = x.float() * (x.abs() > 2**-14)", SUITE),
)


def faulty_tiled(mutation: Mutation | None) -> type[Backend]:
    """`Tiled`, built anew from source with that fault. What else the process holds, the reference too, stays right."""
    with pytest.MonkeyPatch.context() as patch:
        for name in CHAIN[CHAIN.index(mutation.module) if mutation else 0 :]:
            module = _build(name, mutation if mutation and mutation.module == name else None)
            patch.setitem(sys.modules, module.__name__, module)
            parent, _, attribute = module.__name__.rpartition(".")
            patch.setattr(sys.modules[parent], attribute, module)
        return module.Tiled


def _build(name: str, mutation: Mutation | None) -> ModuleType:
    """A second module out of the source of a first, changed."""
    original = ORIGINALS[name]
    source = inspect.getsource(original)
    if mutation is not None:
        assert mutation.old in source, f"{mutation.name}: {mutation.old!r} isn't in {name}"
        source = source.replace(mutation.old, mutation.new)
    module = ModuleType(original.__name__)
    module.__file__ = original.__file__
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)  # where a dataclass looks while it is made
        exec(compile(source, str(original.__file__), "exec"), module.__dict__)
    if name == "moe":
        for shared in SHARED:
            setattr(module, shared, getattr(original, shared))
    return module
