# SPDX-License-Identifier: Apache-2.0
"""Deliberate faults in what serves the small model, and the table of what each moves (`judge.py` measures)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.mutations.backends import ACTIVATE, CHOSEN, GATE, UP, faulty_tiled
from tests.mutations.table import Mutation
from vllm_mxfp4_sm120.moe import MoEWeights

HERE = Path(__file__).parent
MEASURED, README = HERE / "faults.json", HERE / "README.md"

# What rounding stays within, and a fault doesn't: the change of perplexity from transformers' in BF16, and the KL from
# the distributions of transformers in float32 (which are 4e-4 and 0.007 from the engine's in BF16, 7e-4 and 0.014 from
# those of transformers in BF16).
PERPLEXITY_BOUND = 0.005
KL_MEAN_BOUND, KL_P99_BOUND = 8e-4, 1.5e-2

NO_FAULT = "none"


@dataclass(frozen=True)
class Fault:
    """`mutation` of the plain backend's source, or a change of the `weights` before they are prepared, or of the

    `attention` behind the experts' layer; in every layer, or only in `layer`.
    """

    name: str
    what: str
    mutation: Mutation | None = None
    weights: Callable[[MoEWeights], None] | None = None
    attention: Callable[[Any], None] | None = None
    layer: int | None = None


def exchange_two(weights: MoEWeights) -> None:
    for tensor in vars(weights).values():
        tensor[:2] = tensor[:2].flip(0)


def double_one(weights: MoEWeights) -> None:
    weights.w13_scale[0] += 1
    weights.w2_scale[0] += 1


def ignore_sinks(attention: Any) -> None:
    attention.sinks.data.fill_(-torch.inf)


def in_source(module: str, old: str, new: str) -> Mutation:
    return Mutation("", module, old, new, "quality")


FAULTS = (
    Fault(
        "nibbles swapped",
        "the high nibble comes first",
        in_source("mxfp4", "values[byte & 15], values[byte >> 4]", "values[byte >> 4], values[byte & 15]"),
    ),
    Fault(
        "scales off by one",
        "2^(s - 128), in one layer",
        in_source("mxfp4", "SCALE_BIAS = 127", "SCALE_BIAS = 128"),
        layer=2,
    ),
    Fault(
        "first bias missing", "gate_up_proj's", in_source("backends.tiled", "weights.w13_bias, expert", "None, expert")
    ),
    Fault("second bias missing", "down_proj's", in_source("backends.tiled", "weights.w2_bias, expert", "None, expert")),
    Fault(
        "SwiGLU not clamped",
        "neither gate nor up",
        in_source("moe", f"gate, up = {GATE}, {UP}", "pass"),
    ),
    Fault("alpha of 1", "plain SiLU", in_source("moe", "SWIGLU_ALPHA = 1.702", "SWIGLU_ALPHA = 1.0")),
    Fault(
        "gate and up exchanged",
        "up, gate, up, gate...",
        in_source("moe", ACTIVATE, "up, gate = gate_up[..., ::2], gate_up[..., 1::2]"),
    ),
    Fault(
        "top-k not renormalised",
        "a softmax over all experts, of which 4 are taken",
        in_source("moe", CHOSEN, "values.softmax(dim=-1)[:, :top_k]"),
    ),
    Fault(
        "softmax before top-k",
        "and another one over the 4 that are taken",
        in_source("moe", CHOSEN, "values.softmax(dim=-1)[:, :top_k].softmax(dim=-1)"),
    ),
    Fault("an expert doubled", "both products' weights, of one expert in each layer", weights=double_one),
    Fault("experts exchanged", "two in each layer", weights=exchange_two),
    Fault(
        "tail skipped",
        "each expert's last token, if it has two",
        in_source(
            "backends.eager",
            "slice(segment.start, segment.stop)",
            "slice(segment.start, segment.stop - (segment.stop > segment.start + 1))",
        ),
    ),
    Fault("sinks ignored", "attention's softmax is over the keys alone", attention=ignore_sinks),
)


def break_model(model: Any, name: str, checkpoint: str) -> None:
    """Give every MoE layer of a running engine the plain backend, with that fault or `NO_FAULT`.

    Everything is made anew from the checkpoint, so faults can follow each other.
    """
    from vllm_mxfp4_sm120.checkpoint import Checkpoint

    fault = next((fault for fault in FAULTS if fault.name == name), Fault("", ""))
    right, faulty = faulty_tiled(None), faulty_tiled(fault.mutation)
    folder = Checkpoint(checkpoint)
    for index, layer in enumerate(model.model.layers):
        here = fault.layer in (None, index)
        weights = folder.read_layer(index)
        if fault.weights and here:
            fault.weights(weights)
        method = layer.mlp.experts.routed_experts.quant_method
        method.backend = (faulty if here else right)(method.shape)
        method.prepared = method.backend.prepare(weights)
        sinks = folder.read(f"model.layers.{index}.self_attn.sinks")
        layer.attn.sinks.data.copy_(sinks)
        if fault.attention and here:
            fault.attention(layer.attn)


def moved(figures: dict[str, float]) -> bool:
    """Is something beyond its bound?"""
    return (
        abs(perplexity_change(figures)) > PERPLEXITY_BOUND
        or figures["kl_mean"] > KL_MEAN_BOUND
        or figures["kl_p99"] > KL_P99_BOUND
    )


def perplexity_change(figures: dict[str, float]) -> float:
    return figures["perplexity_b"] / figures["perplexity_a"] - 1


def render(measured: dict[str, dict[str, float]]) -> str:
    """README.md."""
    tokens = int(measured[NO_FAULT]["tokens"])
    text = f"""# What a fault moves

The [small model](../../models/gpt-oss-small/README.md) through vLLM's engine and this plugin's plain backend, on
{tokens:,} tokens of held-out text: its perplexity beside that of transformers' BF16 model, and how far its
distributions of the next token are from transformers' in float32. Rounding may change perplexity by
{PERPLEXITY_BOUND:.1%}, and may make a KL of {KL_MEAN_BOUND:g} nats in the mean and {KL_P99_BOUND:g} at the 99th
percentile. Every fault moves at least one of them further; the test beside this file puts each in and compares with
this table.

Generated on a CPU: `PYTHONPATH=.:benchmarks python -m tests.quality.judge`.

| Fault | What is wrong | Perplexity | KL, mean | KL, 99th percentile | Equal greedy tokens |
|---|---|---|---|---|---|
"""
    for name, what in [(NO_FAULT, "")] + [(fault.name, fault.what) for fault in FAULTS]:
        figures = measured[name]
        cells = [name, what, f"{perplexity_change(figures):+.2%}"]
        cells += [f"{figures[key]:.2g}" for key in ("kl_mean", "kl_p99")] + [f"{figures['equal_greedy']:.1%}"]
        text += f"| {' | '.join(cells)} |\n"
    return text


def write(measured: dict[str, dict[str, float]]) -> None:
    MEASURED.write_text(json.dumps(measured, indent=1) + "\n")
    README.write_text(render(measured))
