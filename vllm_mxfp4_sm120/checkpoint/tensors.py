# SPDX-License-Identifier: Apache-2.0
"""Every tensor that a GPT-OSS needs: its name and other spellings of it, dtype, shape, and what its values may be.

Published names are transformers'. Under model.layers.N.mlp.experts lie gate_up_proj (rows = 2I, gate and up
alternating; K = H) and down_proj (rows = H, K = I), each as NAME_blocks uint8 [E, rows, K/32, 16], NAME_scales uint8
[E, rows, K/32] and NAME_bias bf16 [E, rows].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_mxfp4_sm120 import mxfp4
from vllm_mxfp4_sm120.checkpoint.config import AttentionSizes, Sizes
from vllm_mxfp4_sm120.checkpoint.names import EMBEDDING, LM_HEAD, canonical_name, plain, refuse_foreign
from vllm_mxfp4_sm120.log import logger

# Tensors that one message names; a checkpoint of another kind would fill pages.
NAMED_AT_MOST = 8

UNMATCHED = "config.json and weights don't belong together"

# safetensors' names of dtypes that hold the same numbers: bytes under another name (E8M0 is that of scales), and floats
# that are rounded to BF16 as vLLM's own loaders round them (`param.copy_`).
SAME_NUMBERS = {"U8": ("U8", "I8", "F8_E8M0"), "BF16": ("BF16", "F16", "F32")}
DTYPE_NAMES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int32: "I32",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor; dtypes by the format's own names ("U8", "BF16"...).

    `spelling` is its name in `file`, where that isn't the published one. `rows` are the rows of that tensor in `file`
    that are meant, where it holds several fused: (first, last + 1).
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path | None = None
    spelling: str | None = None
    rows: tuple[int, int] | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> TensorInfo:
        return cls(DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def expert_tensors(sizes: Sizes, layer: int) -> dict[str, TensorInfo]:
    """Name, dtype and shape of each expert tensor that a layer must have."""
    tensors = {}
    experts, hidden, intermediate = sizes.num_experts, sizes.hidden_size, sizes.intermediate_size
    for projection, rows, k in (("gate_up_proj", 2 * intermediate, hidden), ("down_proj", hidden, intermediate)):
        name, blocks = expert_prefix(layer, projection), k // mxfp4.BLOCK
        tensors[f"{name}_blocks"] = TensorInfo("U8", (experts, rows, blocks, mxfp4.BLOCK // 2))
        tensors[f"{name}_scales"] = TensorInfo("U8", (experts, rows, blocks))
        tensors[f"{name}_bias"] = TensorInfo("BF16", (experts, rows))
    return tensors


def expert_prefix(layer: int, projection: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{projection}"


def required_tensors(config: Mapping[str, Any], source: str = "config.json") -> dict[str, TensorInfo]:
    """Published name, dtype and shape of every tensor of the whole model, lm_head unless embeddings are tied.

    `config` as in `check_config`. Raises ValueError, naming `source`, for sizes that make no sense.
    """
    sizes, attention = Sizes.from_config(config, source), AttentionSizes.from_config(config, source)
    hidden, heads = sizes.hidden_size, attention.num_heads
    q, kv = heads * attention.head_dim, attention.num_kv_heads * attention.head_dim

    def bf16(*shape: int) -> TensorInfo:
        return TensorInfo("BF16", shape)

    tensors = {EMBEDDING: bf16(attention.vocab_size, hidden), "model.norm.weight": bf16(hidden)}
    if not config.get("tie_word_embeddings", False):
        tensors[LM_HEAD] = bf16(attention.vocab_size, hidden)
    for layer in range(sizes.num_layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = bf16(hidden)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = bf16(hidden)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = bf16(rows, hidden)
            tensors[f"{prefix}.self_attn.{name}_proj.bias"] = bf16(rows)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = bf16(hidden, q)
        tensors[f"{prefix}.self_attn.o_proj.bias"] = bf16(hidden)
        tensors[f"{prefix}.self_attn.sinks"] = bf16(heads)
        tensors[f"{prefix}.mlp.router.weight"] = bf16(sizes.num_experts, hidden)
        tensors[f"{prefix}.mlp.router.bias"] = bf16(sizes.num_experts)
        tensors |= expert_tensors(sizes, layer)
    return tensors


def split_fused(name: str, found: TensorInfo, required: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The published tensors that `found`, by its published name, holds: itself, or q, k and v of a fused qkv_proj."""
    if ".qkv_proj." not in name or not found.shape:
        return {name: found}
    parts, start = {}, 0
    for letter in "qkv":
        part = name.replace(".qkv_proj.", f".{letter}_proj.")
        rows = required[part].shape[0] if part in required else 0
        # A tensor that is too short ends early, and one that is too long gives the rest to v: `check_tensor` says so.
        end = found.shape[0] if letter == "v" else min(start + rows, found.shape[0])
        parts[part] = replace(found, shape=(end - start, *found.shape[1:]), rows=(start, end))
        start = end
    return parts


def is_as_required(found: TensorInfo, expected: TensorInfo) -> bool:
    """Whether `found` holds the numbers that `expected` describes, be it in another wrapping."""
    shapes = [expected.shape]
    if len(expected.shape) == 4:  # blocks: [E, rows, K/32, 16] or [E, rows, K/2]
        shapes.append((*expected.shape[:2], expected.shape[2] * expected.shape[3]))
    return found.dtype in SAME_NUMBERS[expected.dtype] and found.shape in shapes


def check_tensor(name: str, found: TensorInfo | Tensor, required: Mapping[str, TensorInfo], source: object) -> None:
    """Raises ValueError, naming `source`, unless the tensor is as `required_tensors` says, in whatever wrapping."""
    found = TensorInfo.of(found) if isinstance(found, Tensor) else found
    if not is_as_required(found, required[name]):
        raise ValueError(f"{source}: {differs(name, found, required[name])}; {UNMATCHED}")


def differs(name: str, found: TensorInfo, expected: TensorInfo) -> str:
    spelled = f" ({plain(found.spelling)} there)" if found.spelling not in (None, name) else ""
    return f"{name}{spelled} is {found}, expected {expected}"


def as_published(tensor: Tensor, expected: TensorInfo) -> Tensor:
    """The same numbers in the published dtype and shape: a view, or rounded to BF16. The tensor must be as required."""
    if expected.dtype == "U8":
        return tensor.view(torch.uint8).reshape(expected.shape)
    return tensor.to(torch.bfloat16)


# Values


@dataclass
class FiniteCheck:
    """Looks for NaN and Inf in many tensors, and waits for their device only once.

    `add` queues one pass over a tensor, without a copy of it; `finish` raises ValueError, naming the tensors.
    """

    _extremes: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, tensor: Tensor) -> None:
        if tensor.numel() and tensor.is_floating_point() and tensor.itemsize > 1:
            # NaN passes through min and max, Inf is one of them.
            self._extremes[name] = torch.stack(torch.aminmax(tensor.detach())).float()

    def finish(self) -> None:
        devices: dict[torch.device, dict[str, Tensor]] = {}
        for name, pair in self._extremes.items():
            devices.setdefault(pair.device, {})[name] = pair
        self._extremes = {}
        bad: list[str] = []
        for pairs in devices.values():
            finite = torch.stack(list(pairs.values())).isfinite().all(dim=1).tolist()
            bad += [name for name, fine in zip(pairs, finite, strict=True) if not fine]
        if bad:
            raise ValueError(
                f"NaN or Inf (or beyond BF16's range) in {listed(bad)}, expected finite numbers; the checkpoint is "
                "damaged or was saved from a training run that diverged"
            )


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises ValueError if the tensor holds NaN or Inf. Waits for the device: for many tensors use FiniteCheck."""
    check = FiniteCheck()
    check.add(name, tensor)
    check.finish()


def listed(items: list[str], between: str = ", ") -> str:
    """The first few of the items, and how many more."""
    more = f" and {len(items) - NAMED_AT_MOST} more" if len(items) > NAMED_AT_MOST else ""
    return between.join(items[:NAMED_AT_MOST]) + more


# The whole model


def check_complete(names: Iterable[str], required: Mapping[str, TensorInfo], source: object) -> None:
    """Raises ValueError, naming `source`, unless every required tensor is among the names."""
    present = set(names)
    absent = [f"{name} ({info})" for name, info in required.items() if name not in present]
    if absent:
        raise ValueError(
            f"{source}: {listed(absent)} missing, expected all {len(required)} tensors of the model; "
            "it was saved without, or not all of its files were fetched"
        )


def checked(
    weights: Iterable[tuple[str, Tensor]],
    config: Mapping[str, Any],
    source: object = "checkpoint",
    whole: bool = True,
    at_once: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """The weights as they load, from whatever source, under published names, in published dtypes and shapes.

    Tensors that GPT-OSS has no place for are left out; embed_tokens' numbers come as lm_head, too, where that is tied
    and absent. One logged line each says what was left out, that other names were taken, and what was rounded to BF16.

    Raises ValueError, naming the tensor: at once for a wrong dtype or shape, or a second time; after the last tensor
    for NaN or Inf (with `at_once` before that tensor is handed on), and with `whole` for what is missing. Scales are
    looked at when a layer has them all (`MoEWeights.scale_outside`).
    """
    required = required_tensors(config, str(source))
    known = {LM_HEAD: required[EMBEDDING], **required}
    seen: dict[str, str] = {}
    rounded: list[str] = []
    left_out: list[str] = []
    finite = FiniteCheck()
    for spelling, tensor in weights:
        published = canonical_name(spelling)
        if published is None:
            refuse_foreign([spelling], source)
            left_out.append(plain(spelling))
            continue
        for name, info in split_fused(published, TensorInfo.of(tensor), required).items():
            if name not in known:
                layers = Sizes.from_config(config).num_layers
                raise ValueError(f"{source}: holds {name}, but num_hidden_layers is {layers}; {UNMATCHED}")
            if name in seen:
                raise ValueError(f"{source}: {name} comes twice, as {plain(seen[name])} and as {plain(spelling)}")
            check_tensor(name, replace(info, spelling=None if spelling == name else spelling), known, source)
            part = as_published(tensor[slice(*info.rows)] if info.rows else tensor, known[name])
            finite.add(name, part)
            if at_once:
                finite.finish()
            seen[name] = spelling
            if info.dtype in ("F16", "F32"):
                rounded.append(f"{name} ({info.dtype})")
            yield name, part
            if name == EMBEDDING and LM_HEAD not in required and LM_HEAD not in seen:
                yield LM_HEAD, part  # now, for a source may use its memory again; one that comes later replaces it
    finite.finish()
    if whole:
        check_complete(seen, required, source)
    if left_out:
        logger.warning("mxfp4_sm120: %s: left out, for GPT-OSS has no such tensors: %s", source, listed(left_out))
    renamed = [f"{name} ({plain(spelling)} there)" for name, spelling in seen.items() if spelling != name]
    if renamed:
        logger.info("mxfp4_sm120: %s: known by other names: %s", source, listed(renamed))
    if rounded:
        logger.info("mxfp4_sm120: %s: rounded to BF16: %s", source, listed(rounded))
