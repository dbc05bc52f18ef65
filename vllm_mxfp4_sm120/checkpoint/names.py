# SPDX-License-Identifier: Apache-2.0
"""Names of a checkpoint's tensors: known spellings of the published ones, and those of other kinds of checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from vllm_mxfp4_sm120.checkpoint.config import shown

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"

# What wrappers put into a name without touching a number: DDP, torch.compile, FSDP, activation checkpointing.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Other spellings of published names: openai/gpt-oss's own (its `original/` folder), Unsloth's router, vLLM's modules,
# and a bare transformers GptOssModel without its head.
SPELLINGS = tuple(
    (re.compile(pattern), published)
    for pattern, published in (
        (r"^(layers\.\d+\.|embed_tokens\.|norm\.weight$)", r"model.\1"),
        (r"^block\.(\d+)\.", r"model.layers.\1."),
        (r"^(?:model\.)?embedding\.weight$", EMBEDDING),
        (r"^unembedding\.weight$", LM_HEAD),
        (r"^norm\.scale$", "model.norm.weight"),
        (r"\.attn\.norm\.scale$", ".input_layernorm.weight"),
        (r"\.mlp\.norm\.scale$", ".post_attention_layernorm.weight"),
        (r"\.attn\.", ".self_attn."),
        (r"\.self_attn\.qkv\.", ".self_attn.qkv_proj."),
        (r"\.self_attn\.out\.", ".self_attn.o_proj."),
        (r"\.mlp\.(?:gate|router\.linear)\.", ".mlp.router."),
        (r"\.mlp\.mlp1_weight\.", ".mlp.experts.gate_up_proj_"),
        (r"\.mlp\.mlp2_weight\.", ".mlp.experts.down_proj_"),
        (r"\.mlp\.mlp1_bias$", ".mlp.experts.gate_up_proj_bias"),
        (r"\.mlp\.mlp2_bias$", ".mlp.experts.down_proj_bias"),
    )
)
_PUBLISHED = re.compile(
    r"lm_head\.weight|model\.(embed_tokens|norm)\.weight|model\.layers\.(0|[1-9]\d{0,5})\.("
    r"(input|post_attention)_layernorm\.weight"
    r"|self_attn\.(sinks|(q|k|v|o|qkv)_proj\.(weight|bias))"
    r"|mlp\.router\.(weight|bias)"
    r"|mlp\.experts\.(gate_up|down)_proj_(blocks|scales|bias))"
)


def canonical_name(name: str) -> str | None:
    """The published name of a tensor under that or another known spelling, None for what GPT-OSS has no tensor of.

    `self_attn.qkv_proj` (rows of q, then k, then v) comes back as such: `split_fused` makes three of it.
    """
    name = respelled(name)
    return name if _PUBLISHED.fullmatch(name) else None


def respelled(name: str) -> str:
    """The name without wrappers and with each part as it is published; what GPT-OSS doesn't have stays as it is."""
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    for pattern, published in SPELLINGS:
        name = pattern.sub(published, name)
    return name


def layer_of(name: str) -> int | None:
    """The layer that a published name belongs to, if any."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


@dataclass(frozen=True)
class Foreign:
    """Names that show another kind of checkpoint: what it holds, and what makes it servable."""

    pattern: re.Pattern[str]
    holds: str
    remedy: str


FOREIGN = (
    Foreign(
        re.compile(r"^base_model\.|\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b|\.base_layer\."),
        "a LoRA adapter, or a model saved with its adapter still apart",
        "merge the adapter into the model first (PEFT's merge_and_unload) and save that",
    ),
    Foreign(
        re.compile(r"\.experts\.(\d+\.|gate_up_projs\.|down_projs\.|(gate|up)_proj\b|w[123]\b)"),
        "one tensor per expert or projection",
        "save it in the published layout, gate_up_proj_blocks and _scales of all experts in one tensor",
    ),
    Foreign(
        re.compile(r"\.experts\.(gate_up|down)_proj(\.weight)?$"),
        "experts that aren't packed",
        "pack them to MXFP4 first (gate_up_proj_blocks and _scales), or serve them without --quantization mxfp4_sm120",
    ),
    Foreign(
        re.compile(
            r"\.(qweight|qzeros|weight_packed|weight_scale(_2)?|weight_scale_inv|absmax|quant_map)\b|quant_state"
        ),
        "weights of another quantization",
        "serve it with the method that it was quantized for, without --quantization mxfp4_sm120",
    ),
)


def refuse_foreign(names: Iterable[str], source: object) -> None:
    """Raises ValueError, naming `source`, if one of the names shows that this is another kind of checkpoint."""
    names = list(names)
    for foreign in FOREIGN:
        found = [name for name in names if foreign.pattern.search(name)]
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise ValueError(f"{source}: holds {foreign.holds} ({plain(found[0])}{more}); {foreign.remedy}")


def plain(name: str) -> str:
    """A name from a file, fit for a message of one line."""
    return name if name.isprintable() and len(name) < 200 else shown(name)
