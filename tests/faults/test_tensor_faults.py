# SPDX-License-Identifier: Apache-2.0
"""Tensors that are missing, of another kind, no numbers, or wrapped otherwise: refused, or read as the same numbers."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.faults.damage import (
    EXPERTS,
    LAYER,
    a_layer_more,
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
from tests.support.checkpoints import CONFIG, edit_tensors, load_checked, read_experts, rename_tensors
from vllm_mxfp4_sm120.checkpoint import required_tensors

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
    Row(
        "a layer more",
        a_layer_more(5),
        "num_hidden_layers is 2; config.json and weights don't belong together",
    ),
    Row("router bias as a number", edited(f"{LAYER}.mlp.router.bias", lambda t: t[0]), "BF16 [], expected BF16 [3]"),
    Row("sinks of two dimensions", edited(f"{LAYER}.self_attn.sinks", lambda t: t[None]), "BF16 [1, 4], expected"),
    Row("no numbers at all", edited("model.norm.weight", lambda t: t[:0]), "BF16 [0], expected BF16 [96]"),
    Row("an extra norm", added(f"{LAYER}.self_attn.q_norm.weight", 8), SERVED),
    Row("a bias of lm_head", added("lm_head.bias", 40), SERVED),
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
        "DDP's prefix and without",
        lambda d: edit_tensors(d, lambda s: s.update({"module.lm_head.weight": s["lm_head.weight"].clone()})),
        "lm_head.weight",
    ),
    Row(
        "qkv in one tensor and q apart",
        both(
            original_names,
            lambda d: edit_tensors(
                d, lambda s: s.update({f"{LAYER}.self_attn.q_proj.weight": torch.zeros(32, 96).bfloat16()})
            ),
        ),
        "q_proj.weight",
    ),
    Row("layers counted from 1", renamed(("layers.1.", "layers.2."), ("layers.0.", "layers.1.")), "layers"),
    Row("layers with leading zeros", renamed(("layers.0.", "layers.00.")), "missing, expected all 41 tensors"),
    Row("names in capitals", renamed(("lm_head.", "LM_HEAD.")), "lm_head.weight (BF16 [40, 96]) missing"),
    Row("another model's prefix", renamed(("model.", "language_model.model.")), "missing, expected all 41 tensors"),
    Row("Mixtral's experts", renamed((".experts.down_proj_blocks", ".experts.0.w2.weight")), "one tensor per expert"),
    Row("gate and up apart", renamed((".experts.gate_up_proj_blocks", ".experts.gate_proj")), "one tensor per expert"),
    Row("GPTQ", renamed((".q_proj.weight", ".q_proj.qweight")), "holds weights of another quantization"),
    Row("NVFP4", added(f"{EXPERTS}.down_proj_blocks.weight_scale_2", 1), "holds weights of another quantization"),
    Row("DoRA", added(f"{LAYER}.self_attn.q_proj.lora_magnitude_vector", 4), "merge the adapter"),
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
    Row("blocks of whole rows", edited_all("_blocks", lambda t: t.flatten(1)), "is U8 [3, "),
    Row("blocks of all experts in one", edited_all("_blocks", lambda t: t.flatten(0, 1)), "is U8 ["),
    Row("scales with a dimension more", edited_all("_scales", lambda t: t[..., None]), "is U8 [3, "),
    Row("scales flattened", edited_all("_scales", lambda t: t.flatten(1)), "is U8 [3, "),
    Row("experts last", edited_all("_blocks", lambda t: t.movedim(0, -1)), "is U8 ["),
    Row("blocks as int32 words", edited_all("_blocks", lambda t: t.view(torch.int32)), "is I32 [3, "),
    Row("FP8 attention", edited_all("q_proj", lambda t: t.to(torch.float8_e4m3fn)), "expected BF16"),
    Row("FP8 blocks", edited_all("_blocks", lambda t: t.view(torch.float8_e4m3fn)), "expected U8"),
    Row("Boolean blocks", edited_all("_blocks", lambda t: t.bool()), "expected U8"),
    Row("complex router", edited_all("router.bias", lambda t: t.to(torch.complex64)), "expected BF16"),
    Row("int64 sinks", edited_all("sinks", lambda t: t.long()), "is I64 [4], expected BF16 [4]"),
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
    for name, info in required_tensors(CONFIG).items()
    if info.dtype == "BF16" and "layers.0" not in name
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
