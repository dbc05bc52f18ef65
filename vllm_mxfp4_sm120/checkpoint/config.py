# SPDX-License-Identifier: Apache-2.0
"""What a GPT-OSS's config.json says, and what becomes of each key here.

KEYS lists every key that transformers' GptOssConfig has, its modelling reads, or its base class acts on. The reference
for a value's meaning is transformers; what serves it is vLLM's gpt_oss.py with this plugin's experts. Where the two
would differ, or where the plugin computes with a constant, `check_config` refuses every other value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

from vllm_mxfp4_sm120 import config_path, mxfp4, settings
from vllm_mxfp4_sm120.moe import SWIGLU_ALPHA, SWIGLU_LIMIT, MoEShape

MODEL_TYPE = "gpt_oss"
# What published checkpoints say, what vLLM rewrites it to, and what the user may have asked for.
QUANT_METHODS = ("mxfp4", "gpt_oss_mxfp4", "mxfp4_sm120")
PACK_LAYOUT = "low_nibble_first"  # the published one: of a byte's two codes, the earlier is in the low nibble
# Limits of what is plausible, so that nonsense is refused before tables of its size are made.
MOST_LAYERS, MOST = 4096, 1 << 40
SLIDING, FULL = "sliding_attention", "full_attention"


class Fate(StrEnum):
    """What becomes of a key of config.json."""

    USED = "used"
    FIXED = "only one value is served"
    IGNORED = "ignored"


@dataclass(frozen=True)
class Key:
    """One key of config.json. `served` is the only value of a FIXED key; absent means that value."""

    name: str
    fate: Fate
    why: str
    served: Any = None


KEYS = (
    Key("model_type", Fate.USED, "must be gpt_oss"),
    Key("num_hidden_layers", Fate.USED, "the checkpoint must have exactly these layers"),
    Key("num_local_experts", Fate.USED, "sizes of router and experts; num_experts is another name of it"),
    Key("num_experts_per_tok", Fate.USED, "experts that a token goes to, at most num_local_experts"),
    Key("hidden_size", Fate.USED, "sizes of all tensors; whole blocks of 32"),
    Key("intermediate_size", Fate.USED, "sizes of the experts; whole blocks of 32"),
    Key("vocab_size", Fate.USED, "rows of embed_tokens and lm_head"),
    Key("head_dim", Fate.USED, "sizes of attention; hidden_size / num_attention_heads where absent"),
    Key("num_attention_heads", Fate.USED, "sizes of attention, a multiple of num_key_value_heads"),
    Key("num_key_value_heads", Fate.USED, "sizes of attention; num_attention_heads where absent"),
    Key("max_position_embeddings", Fate.USED, "longest request; rotary tables end at factor times the original length"),
    Key("sliding_window", Fate.USED, "window of every second layer's attention"),
    Key("layer_types", Fate.USED, "must be what vLLM serves: even layers with the window, odd ones without"),
    Key("rope_parameters", Fate.USED, "YaRN; keys that vLLM's gpt_oss.py doesn't pass on must not change it"),
    Key("rope_scaling", Fate.USED, "older name of rope_parameters"),
    Key("rope_theta", Fate.USED, "base of the rotary frequencies; older files have it beside rope_scaling"),
    Key("partial_rotary_factor", Fate.USED, "as if it stood in rope_parameters, where only 1 is served"),
    Key("original_max_position_embeddings", Fate.USED, "goes before the one in rope_parameters"),
    Key("tie_word_embeddings", Fate.USED, "where true, lm_head may be absent and is then embed_tokens"),
    Key("quantization_config", Fate.USED, "must name MXFP4, with 32 values a scale and the low nibble first"),
    Key("bos_token_id", Fate.USED, "by vLLM's tokenizer and sampling alone"),
    Key("eos_token_id", Fate.USED, "by vLLM's tokenizer and sampling alone"),
    Key("rms_norm_eps", Fate.FIXED, "vLLM's gpt_oss.py computes with this constant", 1e-5),
    Key("swiglu_limit", Fate.FIXED, "the experts' kernels clamp at this constant", SWIGLU_LIMIT),
    Key("swiglu_alpha", Fate.FIXED, "the experts' kernels compute with this constant", SWIGLU_ALPHA),
    Key("attention_bias", Fate.FIXED, "vLLM's gpt_oss.py always adds q/k/v/o biases", True),
    Key("per_layer_config", Fate.FIXED, "vLLM's gpt_oss.py makes all layers alike"),
    Key("hidden_act", Fate.IGNORED, "neither transformers nor vLLM reads it: the experts' SwiGLU is GPT-OSS's own"),
    Key("pad_token_id", Fate.IGNORED, "the padding row of an embedding matters in training only"),
    Key("attention_dropout", Fate.IGNORED, "training only"),
    Key("initializer_range", Fate.IGNORED, "training only"),
    Key("router_aux_loss_coef", Fate.IGNORED, "training only"),
    Key("output_router_logits", Fate.IGNORED, "an output of transformers only"),
    Key("use_cache", Fate.IGNORED, "vLLM always caches keys and values"),
)


@dataclass(frozen=True)
class Packing:
    """How codes and scales are stored. Only the published way is served; anything else is refused by `from_config`."""

    group_size: int = mxfp4.BLOCK
    pack_layout: str = PACK_LAYOUT

    @classmethod
    def from_config(cls, quantization_config: Mapping[str, Any] | None, source: str = "config.json") -> Packing:
        """From config.json's quantization_config, MXFP4_SM120_GROUP_SIZE and MXFP4_SM120_PACK_LAYOUT going before it.

        What is absent is as published. Raises ValueError, naming `source`, for a checkpoint that is not MXFP4 and for
        a group size or layout that is not served.
        """
        config = quantization(quantization_config, source)
        method = config.get("quant_method")
        if method not in QUANT_METHODS:
            raise ValueError(
                f"{source}: quant_method is {shown(method)}, expected 'mxfp4'; "
                "this plugin serves packed MXFP4 experts only"
            )
        group_size, pack_layout = _overrides()
        group_size = config.get("group_size", mxfp4.BLOCK) if group_size is None else group_size
        pack_layout = config.get("pack_layout", PACK_LAYOUT) if pack_layout is None else pack_layout
        if group_size != mxfp4.BLOCK:
            raise ValueError(
                f"{source}: group_size is {shown(group_size)}, expected {mxfp4.BLOCK}; "
                f"if the file is wrong, set {settings.GROUP_SIZE.name}={mxfp4.BLOCK}"
            )
        if pack_layout != PACK_LAYOUT:
            raise ValueError(
                f"{source}: pack_layout is {shown(pack_layout)}, expected {PACK_LAYOUT!r}; "
                f"if the file is wrong, set {settings.PACK_LAYOUT.name}={PACK_LAYOUT}"
            )
        return cls()


def quantization(value: Any, source: str = "config.json") -> Mapping[str, Any]:
    """config.json's quantization_config, empty where there is none. Raises ValueError, naming `source`."""
    if not isinstance(value, Mapping | None):
        raise ValueError(
            f"{source}: quantization_config is {shown(value)}, expected an object such as "
            '{"quant_method": "mxfp4"}; mend the file'
        )
    return value or {}


def undeclared(source: str) -> ValueError:
    """What is wrong with a config.json that says nothing of experts that are packed."""
    return ValueError(
        f"{source}: quantization_config is missing, although the experts are packed; "
        'add "quantization_config": {"quant_method": "mxfp4"}'
    )


@lru_cache
def _overrides() -> tuple[int | None, str | None]:
    """What the environment says, read once: a process never sees two answers."""
    return settings.GROUP_SIZE.get(), settings.PACK_LAYOUT.get()


def shown(value: Any, most: int = 80) -> str:
    """repr, on one line and short enough for a message."""
    try:
        text = ascii(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}..."


def _size(config: Mapping[str, Any], key: str, source: str, multiple: int = 1, most: int = MOST) -> int:
    value = config.get(key)
    if type(value) is not int or not 0 < value <= most or value % multiple:
        kind = "a positive integer" if multiple == 1 else f"a positive multiple of {multiple}"
        kind += f" up to {most}" if type(value) is int and value > most else ""
        raise ValueError(f"{source}: {key} is {shown(value)}, expected {kind}; the file is damaged")
    return value


def longest_context(config: Mapping[str, Any], source: str) -> int:
    """Tokens of the longest request. Raises ValueError."""
    return _size({"max_position_embeddings": 131072, **config}, "max_position_embeddings", source)


def window(config: Mapping[str, Any], source: str) -> int | None:
    """Tokens that every second layer's attention sees; None for all. Raises ValueError."""
    if config.get("sliding_window", 128) is None:
        return None
    return _size({"sliding_window": 128, **config}, "sliding_window", source)  # GptOssConfig's default


@dataclass(frozen=True)
class Sizes:
    """The numbers of config.json that the experts' tensors follow from."""

    num_layers: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str = "config.json") -> Sizes:
        """From the contents of config.json. Raises ValueError, naming `source`, if it is not a GPT-OSS's."""
        model_type = config.get("model_type")
        if model_type != MODEL_TYPE:
            raise ValueError(
                f"{source}: model_type is {shown(model_type)}, expected {MODEL_TYPE!r}; this plugin serves GPT-OSS only"
            )
        if "num_local_experts" not in config and "num_experts" in config:
            config = {**config, "num_local_experts": config["num_experts"]}
        sizes = cls(
            num_layers=_size(config, "num_hidden_layers", source, most=MOST_LAYERS),
            num_experts=_size(config, "num_local_experts", source),
            hidden_size=_size(config, "hidden_size", source, mxfp4.BLOCK),
            intermediate_size=_size(config, "intermediate_size", source, mxfp4.BLOCK),
            top_k=_size(config, "num_experts_per_tok", source),
        )
        if sizes.top_k > sizes.num_experts:
            raise ValueError(
                f"{source}: num_experts_per_tok is {sizes.top_k}, expected at most num_local_experts, "
                f"{sizes.num_experts}; the file is damaged"
            )
        return sizes

    @property
    def layer(self) -> MoEShape:
        """One whole layer, all its experts on one rank."""
        return MoEShape(self.num_experts, self.num_experts, self.hidden_size, self.intermediate_size, self.top_k)


VOCAB_MULTIPLE = 64  # vLLM pads embedding and output layer to it (DEFAULT_VOCAB_PADDING_SIZE)


@dataclass(frozen=True)
class AttentionSizes:
    """The numbers of config.json that attention's tensors, embedding and output layer follow from."""

    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str = "config.json") -> AttentionSizes:
        """From the contents of config.json. Raises ValueError, naming `source`."""
        heads = _size(config, "num_attention_heads", source)
        # As GptOssConfig fills in what is null.
        filled = {"num_key_value_heads": heads, "head_dim": _size(config, "hidden_size", source) // heads}
        config = {**config, **{key: value for key, value in filled.items() if config.get(key) is None}}
        sizes = cls(
            vocab_size=_size(config, "vocab_size", source),
            num_heads=heads,
            num_kv_heads=_size(config, "num_key_value_heads", source),
            head_dim=_size(config, "head_dim", source, 2),  # rotary embedding turns pairs
        )
        if heads % sizes.num_kv_heads:
            raise ValueError(
                f"{source}: num_attention_heads is {heads}, expected a multiple of num_key_value_heads, "
                f"{sizes.num_kv_heads}; the file is damaged"
            )
        return sizes

    @property
    def padded_vocab_size(self) -> int:
        """As vLLM pads it."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def heads_of_rank(self, tensor_parallel: int) -> tuple[int, int]:
        """Query heads and key-value heads of one rank; where there are fewer of these than ranks, vLLM repeats them."""
        return self.num_heads // tensor_parallel, max(1, self.num_kv_heads // tensor_parallel)


def check_config(config: Mapping[str, Any], source: str = "config.json") -> Packing:
    """Refuse every value of config.json that would not be served as transformers computes it. Reads no file.

    `config` is config.json's contents, or `hf_config.to_dict()` with what the user overrode: what is served is what is
    checked. Enough for `--load-format dummy`, which needs no weights. Returns how the experts are packed. Raises
    ValueError, naming `source`.
    """
    sizes = Sizes.from_config(config, source)
    AttentionSizes.from_config(config, source)
    packing = Packing.from_config(config.get("quantization_config"), source)
    for key in KEYS:
        value = config.get(key.name, key.served)
        if key.fate is Fate.FIXED and (
            isinstance(value, bool) is not isinstance(key.served, bool) or value != key.served
        ):
            raise ValueError(f"{source}: {key.name} is {shown(value)}, expected {key.served}; {key.why}")
    if not isinstance(config.get("tie_word_embeddings", False), bool):
        raise ValueError(
            f"{source}: tie_word_embeddings is {shown(config['tie_word_embeddings'])}, expected true or false"
        )
    _check_windows(config, sizes.num_layers, source)
    _check_rope(config, source)
    return packing


def _check_windows(config: Mapping[str, Any], layers: int, source: str) -> None:
    seen = window(config, source)
    served = [SLIDING if layer % 2 == 0 else FULL for layer in range(layers)]
    types = config.get("layer_types")
    types = served if types is None else types
    known = isinstance(types, list | tuple) and all(kind in (SLIDING, FULL) for kind in types)
    if not known or len(types) < layers:
        raise ValueError(
            f"{source}: layer_types is {shown(types)}, expected {layers} times {SLIDING!r} or {FULL!r}, one a layer"
        )
    for layer, (kind, expected) in enumerate(zip(types, served, strict=False)):
        if kind != expected and seen is not None:
            raise ValueError(
                f"{source}: layer_types has {kind!r} for layer {layer}, expected {expected!r}; "
                "vLLM's gpt_oss.py gives the window to even layers only"
            )


def _check_rope(config: Mapping[str, Any], source: str) -> None:
    """That vLLM's YaRN is transformers'. vLLM's gpt_oss.py hands on no attention_factor, mscale or partial factor."""
    # As transformers reads it: rope_scaling goes before rope_parameters, rope_theta may lie beside either.
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    if rope is None:  # GptOssConfig's own, the published one
        if config.get("max_position_embeddings") is not None:
            longest_context(config, source)
        return
    if not isinstance(rope, Mapping):
        raise ValueError(f"{source}: rope_scaling is {shown(rope)}, expected an object with rope_type 'yarn'")
    beside = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None}
    rope = {"rope_theta": 150000.0, "truncate": True, **beside, **rope}
    rope["original_max_position_embeddings"] = config.get(
        "original_max_position_embeddings", rope.get("original_max_position_embeddings")
    )

    def refuse(key: str, expected: str) -> ValueError:
        return ValueError(f"{source}: rope {key} is {shown(rope.get(key))}, expected {expected}")

    rope.setdefault("rope_type", rope.get("type"))
    if rope["rope_type"] != "yarn":
        raise refuse("rope_type", "'yarn', which is all that vLLM's gpt_oss.py computes")
    for key in ("rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
        value = rope.get(key)
        least = 1 if key == "factor" else 0
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= MOST or not value:
            raise refuse(key, "a number of at least 1" if least else "a positive number")
    if not isinstance(rope["truncate"], bool):
        raise refuse("truncate", "true or false")
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise refuse("partial_rotary_factor", "1, which is all that vLLM's gpt_oss.py computes")
    attention_factor, computed = rope.get("attention_factor"), 0.1 * math.log(rope["factor"]) + 1
    if attention_factor is not None and (
        type(attention_factor) not in (int, float) or not math.isclose(attention_factor, computed, rel_tol=1e-6)
    ):
        raise refuse("attention_factor", f"{computed:.6f}, 0.1 ln(factor) + 1, which is all that vLLM computes")
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        raise refuse("mscale", "none: vLLM's gpt_oss.py doesn't hand it on")
    reach = rope["factor"] * rope["original_max_position_embeddings"]
    longest = longest_context(config, source)
    if longest > reach:
        raise ValueError(
            f"{source}: max_position_embeddings is {longest}, expected at most {reach:.0f}, rope factor times "
            "original_max_position_embeddings, where vLLM's rotary table ends; lower it, as by --hf-overrides"
        )


def published_config(model: str) -> dict[str, Any]:
    """config.json of a published model as far as shapes go: "openai/gpt-oss-20b" or "openai/gpt-oss-120b"."""
    config: dict[str, Any] = json.loads(config_path("models", f"{model.rpartition('/')[2]}.json").read_text())
    return config
