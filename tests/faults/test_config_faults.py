# SPDX-License-Identifier: Apache-2.0
"""What config.json, or what was put in its place, says: refused on one line, or taken."""

from __future__ import annotations

from pathlib import Path

from tests.faults.damage import both, config, untouched
from tests.faults.table import SERVED, Row, parametrize
from tests.support.checkpoints import read_experts

ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}


CONFIGS = [
    Row("swiglu_limit", config(swiglu_limit=0.5), "swiglu_limit is 0.5, expected 7.0; the experts' kernels clamp"),
    Row("swiglu_limit none", config(swiglu_limit=None), "swiglu_limit is None, expected 7.0"),
    Row("swiglu_limit as integer", config(swiglu_limit=7), SERVED),
    Row("swiglu_alpha", config(swiglu_alpha=1.0), "swiglu_alpha is 1.0, expected 1.702"),
    Row("rms_norm_eps", config(rms_norm_eps=1e-6), "rms_norm_eps is 1e-06, expected 1e-05"),
    Row("attention_bias", config(attention_bias=False), "attention_bias is False, expected True"),
    Row("hidden_act, which nobody reads", config(hidden_act="gelu"), SERVED),
    Row("experts_per_token, which nobody reads", config(experts_per_token=9), SERVED),
    Row(
        "more experts a token than there are",
        config(num_experts_per_tok=4),
        "num_experts_per_tok is 4, expected at most",
    ),
    Row("num_experts, another name", both(config(num_experts=3, num_local_experts=...)), SERVED),
    Row(
        "windows on the other layers",
        config(layer_types=["full_attention", "sliding_attention"]),
        "layer_types has 'full_attention'",
    ),
    Row("too few layer_types", config(layer_types=["sliding_attention"]), "expected 2 times 'sliding_attention' or"),
    Row(
        "unknown layer_types",
        config(layer_types=["sliding_attention", "linear"]),
        "expected 2 times 'sliding_attention' or",
    ),
    Row("no window and all layers full", config(layer_types=["full_attention"] * 2, sliding_window=None), SERVED),
    Row("sliding_window of 0", config(sliding_window=0), "sliding_window is 0, expected a positive integer"),
    Row("sliding_window as text", config(sliding_window="128"), "sliding_window is '128', expected a positive integer"),
    Row("rope YaRN", config(rope_scaling=ROPE, rope_theta=150000), SERVED),
    Row(
        "rope linear",
        config(rope_scaling={"rope_type": "linear", "factor": 2.0}),
        "rope rope_type is 'linear', expected 'yarn'",
    ),
    Row(
        "rope without factor",
        config(rope_scaling={**ROPE, "factor": None}),
        "rope factor is None, expected a number of at least 1",
    ),
    Row("rope factor of 0.5", config(rope_scaling={**ROPE, "factor": 0.5}), "rope factor is 0.5, expected a number"),
    Row(
        "rope without beta",
        config(rope_scaling={**ROPE, "beta_fast": None}),
        "rope beta_fast is None, expected a positive",
    ),
    Row(
        "rope attention_factor",
        config(rope_parameters={**ROPE, "attention_factor": 2.0}),
        "rope attention_factor is 2.0, expected 1.346574",
    ),
    Row(
        "rope attention_factor as computed",
        config(rope_parameters={**ROPE, "attention_factor": 1.3465735902799727}),
        SERVED,
    ),
    Row(
        "rope mscale",
        config(rope_parameters={**ROPE, "mscale": 1.0, "mscale_all_dim": 2.0}),
        "rope mscale is 1.0, expected none",
    ),
    Row(
        "rope partial",
        config(rope_parameters={**ROPE, "partial_rotary_factor": 0.5}),
        "rope partial_rotary_factor is 0.5, expected 1",
    ),
    Row(
        "rope partial beside", config(rope_scaling=ROPE, partial_rotary_factor=0.5), "rope partial_rotary_factor is 0.5"
    ),
    Row(
        "rope original length beside",
        config(rope_scaling=ROPE, original_max_position_embeddings=1024),
        "max_position_embeddings is 131072, expected at most 32768",
    ),
    Row("layers that differ", config(per_layer_config={"1": {"num_local_experts": 1}}), "per_layer_config is {'1'"),
    Row(
        "rope of each kind of layer",
        config(rope_scaling={"full_attention": ROPE, "sliding_attention": ROPE}),
        "rope rope_type is None, expected 'yarn'",
    ),
    Row(
        "rope by its older key",
        config(rope_scaling={**{k: ROPE[k] for k in ROPE if k != "rope_type"}, "type": "yarn"}),
        SERVED,
    ),
    Row("rope theta of 0", config(rope_scaling=ROPE, rope_theta=0), "rope rope_theta is 0, expected a positive number"),
    Row("rope theta as text", config(rope_scaling=ROPE, rope_theta="150000"), "rope rope_theta is '150000', expected"),
    Row(
        "rope factor of infinity", config(rope_scaling={**ROPE, "factor": float("inf")}), "rope factor is inf, expected"
    ),
    Row("rope truncate as number", config(rope_scaling={**ROPE, "truncate": 0}), "rope truncate is 0, expected true"),
    Row("no heads", config(num_attention_heads=0), "num_attention_heads is 0, expected a positive integer"),
    Row("head_dim null", config(head_dim=None), "expected BF16 [96, 96]"),
    Row("key heads null", config(num_key_value_heads=None), "expected BF16 [32, 96]"),
    Row("no experts a token", config(num_experts_per_tok=0), "num_experts_per_tok is 0, expected a positive integer"),
    Row("positions null", config(max_position_embeddings=None), SERVED),
    Row("positions negative", config(rope_scaling=ROPE, max_position_embeddings=-1), "max_position_embeddings is -1"),
    Row("rms_norm_eps null", config(rms_norm_eps=None), "rms_norm_eps is None, expected 1e-05"),
    Row("attention_bias as number", config(attention_bias=1), "attention_bias is 1, expected True"),
    Row("quant_method in capitals", config(quantization_config={"quant_method": "MXFP4"}), "quant_method is 'MXFP4'"),
    Row(
        "group_size as text",
        config(quantization_config={"quant_method": "mxfp4", "group_size": "32"}),
        "group_size is '32'",
    ),
    Row("quantization_config empty", config(quantization_config={}), "quant_method is None, expected 'mxfp4'"),
    Row("rope as text", config(rope_scaling="yarn"), "rope_scaling is 'yarn', expected an object"),
    Row(
        "positions beyond the table",
        config(rope_scaling={**ROPE, "factor": 2}, max_position_embeddings=8193),
        "expected at most 8192",
    ),
    Row("tied as text", config(tie_word_embeddings="false"), "tie_word_embeddings is 'false', expected true or false"),
    Row("heads that don't divide", config(num_key_value_heads=3), "num_attention_heads is 4, expected a multiple of"),
    Row("head_dim odd", config(head_dim=7), "head_dim is 7, expected a positive multiple of 2"),
    Row("hidden_size in no blocks", config(hidden_size=100), "hidden_size is 100, expected a positive multiple of 32"),
    Row(
        "intermediate_size none",
        config(intermediate_size=None),
        "intermediate_size is None, expected a positive multiple of 32",
    ),
    Row("experts as text", config(num_local_experts="3"), "num_local_experts is '3', expected a positive integer"),
    Row("layers true", config(num_hidden_layers=True), "num_hidden_layers is True, expected a positive integer"),
    Row("vocab_size negative", config(vocab_size=-1), "vocab_size is -1, expected a positive integer"),
    Row("a layer more by override", untouched, "holds 2 layers, but num_hidden_layers is 3", {"num_hidden_layers": 3}),
    Row("a layer fewer by override", untouched, "holds 2 layers, but num_hidden_layers is 1", {"num_hidden_layers": 1}),
    Row("an expert more by override", untouched, "expected U8 [4, 128, 3, 16]", {"num_local_experts": 4}),
    Row("mended by override", config(swiglu_limit=0.5), SERVED, {"swiglu_limit": 7.0}),
    Row(
        "quantization_config by override",
        config(quantization_config=...),
        SERVED,
        {"quantization_config": {"quant_method": "mxfp4"}},
    ),
    Row(
        "quantization_config lost",
        config(quantization_config=...),
        'add "quantization_config": {"quant_method": "mxfp4"}',
    ),
    Row(
        "quantization_config null",
        config(quantization_config=None),
        'add "quantization_config": {"quant_method": "mxfp4"}',
    ),
    Row(
        "quantization_config as text",
        config(quantization_config="mxfp4"),
        "quantization_config is 'mxfp4', expected an object",
    ),
    Row(
        "quantization_config of another",
        config(quantization_config={"quant_method": "fp8"}),
        "quant_method is 'fp8', expected 'mxfp4'",
    ),
    Row(
        "quant_method as list",
        config(quantization_config={"quant_method": ["mxfp4"]}),
        "quant_method is ['mxfp4'], expected 'mxfp4'",
    ),
    Row(
        "group_size 16",
        config(quantization_config={"quant_method": "mxfp4", "group_size": 16}),
        "group_size is 16, expected 32; if the file is wrong, set MXFP4_SM120_GROUP_SIZE=32",
    ),
    Row(
        "pack_layout planar",
        config(quantization_config={"quant_method": "mxfp4", "pack_layout": "planar"}),
        "pack_layout is 'planar', expected 'low_nibble_first'; if the file is wrong, set MXFP4_SM120_PACK_LAYOUT=",
    ),
    Row("another model", config(model_type="llama"), "model_type is 'llama', expected 'gpt_oss'"),
]


@parametrize(CONFIGS)
def test_config(row: Row, copy: Path, sound: Path) -> None:
    row.damage(copy)
    row.check(lambda: read_experts(copy, row.overrides), read_experts(sound))
