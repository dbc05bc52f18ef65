# SPDX-License-Identifier: Apache-2.0
"""Tensors that are missing, of another kind, no numbers, or wrapped otherwise: refused, or read as the same numbers."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.faults.damage import (
    EXPERTS,
    LAYER,
    added,
    both,
    config,
    edited,
    edited_all,
    original_names,
    per_expert,
    renamed,
    tied,
    unpacked,
    untouched,
    with_value,
    without,
)
from tests.faults.table import SERVED, Row, parametrize
from tests.support.checkpoints import edit_tensors, load_checked, read_experts, rename_tensors

# Tensors that are missing, too small, or somebody else's
TENSORS = [
    Row("sound", untouched, SERVED),
    Row("no down_proj_scales", without(f"{EXPERTS}.down_proj_scales"), f"{EXPERTS}.down_proj_scales (U8 [3, 96, 2])"),
    Row(
        "a layer without experts",
        lambda d: edit_tensors(d, lambda s: [s.pop(n) for n in list(s) if EXPERTS in n]),
        "down_proj_bias (BF16 [3, 96]) missing, expected all 41 tensors",
    ),
    Row(
        "scales of half of the rows",
        edited(f"{EXPERTS}.down_proj_scales", lambda t: t[:, :48]),
        "U8 [3, 48, 2], expected",
    ),
    Row("an expert fewer", edited_all("experts", lambda t: t[:2]), " [2, "),
    Row("blocks cut", edited(f"{EXPERTS}.down_proj_blocks", lambda t: t[:, :, :1]), "U8 [3, 96, 1, 16], expected"),
    Row(
        "bias cut",
        edited(f"{EXPERTS}.gate_up_proj_bias", lambda t: t[:, :127]),
        "BF16 [3, 127], expected BF16 [3, 128]",
    ),
    Row(
        "blocks and scales exchanged",
        lambda d: edit_tensors(
            d,
            lambda s: s.update(
                {
                    f"{EXPERTS}.down_proj_blocks": s[f"{EXPERTS}.down_proj_scales"],
                    f"{EXPERTS}.down_proj_scales": s[f"{EXPERTS}.down_proj_blocks"],
                }
            ),
        ),
        "config.json and weights don't belong together",
    ),
    Row(
        "no q_proj",
        without(f"{LAYER}.self_attn.q_proj.weight"),
        f"{LAYER}.self_attn.q_proj.weight (BF16 [32, 96]) missing",
    ),
    Row(
        "no v_proj bias",
        without(f"{LAYER}.self_attn.v_proj.bias"),
        f"{LAYER}.self_attn.v_proj.bias (BF16 [16]) missing",
    ),
    Row("no sinks", without(f"{LAYER}.self_attn.sinks"), "self_attn.sinks (BF16 [4]) missing"),
    Row("no router", without(f"{LAYER}.mlp.router.weight"), "mlp.router.weight (BF16 [3, 96]) missing"),
    Row("no router bias", without(f"{LAYER}.mlp.router.bias"), "mlp.router.bias (BF16 [3]) missing"),
    Row(
        "no norm of a layer",
        without(f"{LAYER}.post_attention_layernorm.weight"),
        "layernorm.weight (BF16 [96]) missing",
    ),
    Row("no last norm", without("model.norm.weight"), "model.norm.weight (BF16 [96]) missing"),
    Row("no lm_head", without("lm_head.weight"), "lm_head.weight (BF16 [40, 96]) missing"),
    Row("no embedding", without("model.embed_tokens.weight"), "model.embed_tokens.weight (BF16 [40, 96]) missing"),
    Row(
        "all missing are said",
        without(f"{LAYER}.self_attn.sinks", "lm_head.weight"),
        "lm_head.weight (BF16 [40, 96]), model",
    ),
    Row("lm_head tied, absent", tied, SERVED),
    Row("lm_head tied and there", config(tie_word_embeddings=True), SERVED),
    Row(
        "k_proj of more heads",
        edited(f"{LAYER}.self_attn.k_proj.weight", lambda t: torch.cat([t, t])),
        "BF16 [32, 96], expected BF16 [16, 96]",
    ),
    Row(
        "o_proj transposed",
        edited(f"{LAYER}.self_attn.o_proj.weight", lambda t: t.T),
        "BF16 [32, 96], expected BF16 [96, 32]",
    ),
    Row(
        "another vocabulary",
        edited("model.embed_tokens.weight", lambda t: t[:39]),
        "BF16 [39, 96], expected BF16 [40, 96]",
    ),
    Row(
        "router in a quantizer's layout",
        edited(f"{LAYER}.mlp.router.weight", lambda t: t.to(torch.int8)),
        "I8 [3, 96], expected BF16",
    ),
    Row("an extra tensor", added("model.layers.0.self_attn.rotary_emb.inv_freq", 4), SERVED),
]

# The same numbers under other names, or other tensors altogether
NAMES = [
    Row("Unsloth's router", renamed((".router.", ".router.linear.")), SERVED),
    Row("vLLM's attention", renamed((".self_attn.", ".attn.")), SERVED),
    Row("openai's own names", original_names, SERVED),
    Row(
        "openai's own names and a short qkv",
        both(original_names, edited("block.1.attn.qkv.weight", lambda t: t[:-1])),
        "v_proj.weight (block.1.attn.qkv.weight there) is BF16 [15, 96], expected BF16 [16, 96]",
    ),
    Row("DDP's prefix", lambda d: rename_tensors(d, lambda name: f"module.{name}"), SERVED),
    Row("torch.compile's prefix", lambda d: rename_tensors(d, lambda name: f"_orig_mod.{name}"), SERVED),
    Row("checkpointed layers", renamed(("layers.0.", "layers.0._checkpoint_wrapped_module.")), SERVED),
    Row("without model.", renamed(("model.", "")), SERVED),
    Row(
        "two spellings of one tensor",
        lambda d: edit_tensors(
            d, lambda s: s.update({f"{LAYER}.mlp.router.linear.weight": s[f"{LAYER}.mlp.router.weight"].clone()})
        ),
        "router.linear.weight",
    ),
    Row(
        "PEFT's prefix",
        lambda d: rename_tensors(d, lambda name: f"base_model.model.{name}"),
        "merge the adapter into the model first",
    ),
    Row(
        "a LoRA adapter beside the weights",
        added("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
        "merge the adapter",
    ),
    Row(
        "an adapter's base layer",
        renamed((".q_proj.", ".q_proj.base_layer.")),
        "merge the adapter into the model first",
    ),
    Row("one tensor an expert", per_expert, "holds one tensor per expert or projection (model.layers.1.mlp.experts.0."),
    Row("Unsloth's experts", renamed((".experts.down_proj_", ".experts.down_projs.0.")), "one tensor per expert"),
    Row(
        "BF16 experts",
        unpacked,
        "holds experts that aren't packed (model.layers.0.mlp.experts.down_proj",
    ),
    Row("bitsandbytes", added(f"{LAYER}.self_attn.q_proj.weight.absmax", 4), "holds weights of another quantization"),
    Row(
        "compressed-tensors",
        added(f"{LAYER}.self_attn.q_proj.weight_packed", 4),
        "holds weights of another quantization",
    ),
]

# The same numbers in other wrapping, and numbers that are none
VALUES = [
    Row("F32 biases", edited_all("_bias", lambda t: t.float()), SERVED),
    Row("F16 biases", edited_all("_bias", lambda t: t.bfloat16().half().bfloat16().half()), SERVED),
    Row(
        "F32 norms, sinks and router",
        both(*(edited_all(p, lambda t: t.float()) for p in ("norm", "sinks", "router"))),
        SERVED,
    ),
    Row("F32 attention", edited_all("self_attn", lambda t: t.float()), SERVED),
    Row("F64 biases", edited_all("_bias", lambda t: t.double()), "is F64 [3, "),
    Row("float8_e8m0fnu scales", edited_all("_scales", lambda t: t.view(torch.float8_e8m0fnu)), SERVED),
    Row(
        "int8 scales and blocks",
        both(*(edited_all(p, lambda t: t.view(torch.int8)) for p in ("_scales", "_blocks"))),
        SERVED,
    ),
    Row("blocks in three dimensions", edited_all("_blocks", lambda t: t.flatten(-2)), SERVED),
    Row("int32 scales", edited_all("_scales", lambda t: t.int()), "is I32 [3, "),
    Row("float scales", edited_all("_scales", lambda t: t.bfloat16()), "is BF16 [3, "),
    Row(
        "F32 bias beyond BF16",
        both(edited_all("_bias", lambda t: t.float()), with_value(f"{EXPERTS}.down_proj_bias", 3.4e38)),
        "BF16's range) in model.layers.1.mlp.experts.down_proj_bias",
    ),
]

# Scales that are none: seen where a layer has them all
SCALES = [
    Row(
        "a scale of 255", with_value(f"{EXPERTS}.down_proj_scales", 255), f"{EXPERTS}.down_proj_scales[1, 48, 0] is 255"
    ),
    Row(
        "float8_e8m0fnu scale of 255",
        both(
            with_value(f"{EXPERTS}.down_proj_scales", 255),
            edited_all("_scales", lambda t: t.view(torch.float8_e8m0fnu)),
        ),
        f"{EXPERTS}.down_proj_scales[1, 48, 0] is 255 (NaN)",
    ),
    Row(
        "a scale of 255 over zeros",
        both(
            with_value(f"{EXPERTS}.down_proj_scales", 255),
            edited(f"{EXPERTS}.down_proj_blocks", torch.zeros_like),
        ),
        f"{EXPERTS}.down_proj_scales[1, 48, 0] is 255 (NaN)",
    ),
]

# Numbers that are none: seen as they load
NOT_FINITE = [
    Row(f"NaN in {name}", with_value(name, float("nan")), f"NaN or Inf (or beyond BF16's range) in {name}")
    for name in (
        f"{EXPERTS}.gate_up_proj_bias",
        f"{LAYER}.mlp.router.weight",
        f"{LAYER}.mlp.router.bias",
        f"{LAYER}.self_attn.sinks",
        f"{LAYER}.self_attn.q_proj.weight",
        f"{LAYER}.input_layernorm.weight",
        "model.embed_tokens.weight",
    )
] + [
    Row(f"Inf in {name}", with_value(name, float("-inf")), f"NaN or Inf (or beyond BF16's range) in {name}")
    for name in (f"{EXPERTS}.down_proj_bias", f"{LAYER}.self_attn.o_proj.bias", "lm_head.weight")
]


@parametrize(TENSORS + NAMES + VALUES + SCALES)
def test_a_folder(row: Row, copy: Path, sound: Path) -> None:
    """Refused from the headers, or as its experts are read; or read as the sound one's experts."""
    row.damage(copy)
    row.check(lambda: read_experts(copy), read_experts(sound))


@parametrize(TENSORS + NAMES + VALUES + NOT_FINITE)
def test_any_other_source(row: Row, copy: Path, sound: Path) -> None:
    """Refused, or loaded as the same tensors, from a source that is no folder."""
    row.damage(copy)
    expected = load_checked(sound)
    if row.name.startswith("lm_head tied, absent"):
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    row.check(lambda: load_checked(copy), expected)
