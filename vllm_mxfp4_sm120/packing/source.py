# SPDX-License-Identifier: Apache-2.0
"""A GPT-OSS's folder as trainers leave it, checked from its headers, then read an expert at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_mxfp4_sm120 import mxfp4
from vllm_mxfp4_sm120.checkpoint.config import (
    QUANT_METHODS,
    Sizes,
    check_config,
    published_config,
    quantization,
    shown,
)
from vllm_mxfp4_sm120.checkpoint.headers import open_shard, read_headers, read_json
from vllm_mxfp4_sm120.checkpoint.names import EMBEDDING, LM_HEAD, canonical_name, plain, refuse_foreign
from vllm_mxfp4_sm120.checkpoint.survey import something_else
from vllm_mxfp4_sm120.checkpoint.tensors import (
    SAME_NUMBERS,
    TensorInfo,
    as_published,
    check_finite,
    differs,
    expert_prefix,
    is_as_required,
    listed,
    required_tensors,
    split_fused,
)
from vllm_mxfp4_sm120.packing.adapter import Adapter
from vllm_mxfp4_sm120.packing.names import Piece, part_shape, piece_of, without_peft

PROJECTIONS = ("gate_up_proj", "down_proj")
# `unpack` leaves the scales here that rounding wouldn't find again: beside the model, and not in its index.
KNOWN_SCALES = "mxfp4_scales-*.safetensors"
DTYPE_KEYS = ("dtype", "torch_dtype")  # of config.json: transformers' name, and its older one


class Unfit(ValueError):
    """Tensors that are missing or don't fit; `problems` has a line for each, the message the first few."""

    def __init__(self, directory: Path, problems: list[str]) -> None:
        super().__init__(f"{directory}: {listed(problems, '; ')}; config.json and weights don't belong together")
        self.problems = problems


class Source:
    """What is to be packed: every tensor found, of a dtype and shape that fits config.json.

    `config` is the packed checkpoint's. Experts may be floats in any way that `names` knows, or packed already: those
    stay as they are. Raises ValueError from the constructor, naming all tensors that are missing or don't fit.
    With config.json's contents and the headers of its shards given, the directory is but a name for messages.
    """

    def __init__(
        self,
        directory: str | Path,
        adapter: str | Path | None = None,
        config: Mapping[str, Any] | None = None,
        headers: Mapping[str, TensorInfo] | None = None,
    ) -> None:
        self.directory = Path(directory)
        if what := something_else(self.directory):
            raise ValueError(f"{self.directory}: {what}")
        source = str(self.directory / "config.json")
        config = read_json(self.directory / "config.json") if config is None else config
        method = quantization(config.get("quantization_config"), source).get("quant_method", "mxfp4")
        if method not in QUANT_METHODS:
            raise ValueError(
                f"{source}: quant_method is {shown(method)}, expected a BF16 model; dequantize it where it was "
                "quantized, or merge the adapter into the BF16 model that it was trained from"
            )
        self.config = packed_config(config)
        check_config(self.config, source)
        self.sizes = Sizes.from_config(self.config, source)
        self.required = required_tensors(self.config, source)
        self.pieces: dict[Piece, TensorInfo] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.left_out: list[str] = []
        self._sort(read_headers(self.directory) if headers is None else headers)
        self.adapter = None if adapter is None else Adapter(adapter, self.sizes, self.required)
        self.transposed = self._orientation()
        if wrong := list(self._wrong()):
            raise Unfit(self.directory, wrong)
        self.known = {name: file for file in sorted(self.directory.glob(KNOWN_SCALES)) for name in _names(file)}

    def is_packed(self, layer: int, projection: str) -> bool:
        """Whether the source has codes and scales of it, and no adapter changes them."""
        touched = self.adapter is not None and self.adapter.touches(layer, projection)
        return self._has_codes(layer, projection) and not touched

    def packed(self, layer: int, projection: str) -> tuple[Tensor, Tensor]:
        """Codes and scales as they are, in published shapes."""
        name = expert_prefix(layer, projection)
        blocks, scales = (self._published(f"{name}_{kind}") for kind in ("blocks", "scales"))
        if int(scales.max()) == mxfp4.NAN_SCALE:
            where = (scales == mxfp4.NAN_SCALE).nonzero()[0].tolist()
            raise ValueError(
                f"{self.directory}: {name}_scales{where} is 255 (NaN), expected 0 to 254; the checkpoint is damaged"
            )
        return blocks, scales

    def weights(self, layer: int, projection: str, expert: int, device: torch.device) -> Tensor:
        """One expert's [rows, K], gate and up alternating, the adapter merged (then in float32). Finite or refused."""
        if self._has_codes(layer, projection):
            name = expert_prefix(layer, projection)
            codes, scales = (self._slice(self.tensors[f"{name}_{kind}"], expert) for kind in ("blocks", "scales"))
            weights = mxfp4.dequantize(codes.flatten(1).to(device), scales.to(device))
        elif projection == "down_proj":
            weights = self._part(Piece(layer, "down"), expert).to(device)
        elif self._has(Piece(layer, "gate_up")):
            weights = self._part(Piece(layer, "gate_up"), expert).to(device)
        else:
            gate, up = (self._part(Piece(layer, part), expert).to(device) for part in ("gate", "up"))
            weights = torch.stack((gate, up), 1).flatten(0, 1)
        if self.adapter is not None:
            weights = self.adapter.merge_expert(layer, projection, expert, weights)
        check_finite(f"{expert_prefix(layer, projection)} of expert {expert}", weights)
        return weights

    def known_scales(self, layer: int, projection: str) -> Tensor | None:
        """uint8 [E, rows, K/32] that the experts had before they were unpacked, where that is known."""
        name = f"{expert_prefix(layer, projection)}_scales"
        if self._has_codes(layer, projection):
            return self._published(name)
        file = self.known.get(name)
        if file is None:
            return None
        with open_shard(file) as shard:
            scales = shard.get_tensor(name)
        return scales if TensorInfo.of(scales) == self.required[name] else None

    def bias(self, layer: int, projection: str) -> Tensor:
        """bf16 [E, rows]."""
        experts = range(self.sizes.num_experts)

        def of(part: str) -> Tensor:
            piece = Piece(layer, part, bias=True)
            if piece in self.pieces:
                return self._read(self.pieces[piece])
            return torch.stack([self._read(self.pieces[replace(piece, expert=expert)]) for expert in experts])

        if projection == "down_proj":
            bias = of("down")
        elif self._has(Piece(layer, "gate_up", bias=True)):
            bias = of("gate_up")
        else:
            bias = torch.stack((of("gate"), of("up")), -1).flatten(1)
        name = f"{expert_prefix(layer, projection)}_bias"
        if self.adapter is not None:
            bias = self.adapter.replacement(name, bias)
        return self._finite(name, as_published(bias, self.required[name]))

    def rest(self, name: str) -> Tensor:
        """A tensor that isn't of the experts, BF16, the adapter merged."""
        tensor = self._slice_rows(self.tensors[name])
        if self.adapter is not None:
            tensor = self.adapter.merge(name, tensor)
        return self._finite(name, as_published(tensor, self.required.get(name, self.required[EMBEDDING])))

    # What lies where

    def _sort(self, headers: Mapping[str, TensorInfo]) -> None:
        names = [without_peft(name) for name in headers]
        if unmerged := [name for name in names if ".lora_" in name or ".modules_to_save." in name]:
            raise ValueError(
                f"{self.directory}: holds a LoRA that isn't merged ({plain(unmerged[0])}); merge it first (PEFT's "
                "merge_and_unload), or give the base model and the adapter's folder with --adapter"
            )
        unknown = []
        for spelling, header in headers.items():
            piece, name = piece_of(spelling), canonical_name(without_peft(spelling))
            found = replace(header, spelling=spelling)
            if piece is not None:
                if piece in self.pieces:
                    raise self._twice(spelling, self.pieces[piece])
                self.pieces[piece] = found
            elif name is not None:
                for part, info in split_fused(name, found, self.required).items():
                    if part in self.tensors:
                        raise self._twice(spelling, self.tensors[part])
                    self.tensors[part] = info
            else:
                unknown.append(spelling)
        refuse_foreign([without_peft(name) for name in unknown], self.directory)
        # A copy of tied embeddings is served as such, if it is there (`checked`).
        served = {*self.required, LM_HEAD}
        self.left_out = unknown + [name for name in self.tensors if name not in served]
        self.tensors = {name: info for name, info in self.tensors.items() if name in served}

    def _twice(self, spelling: str, other: TensorInfo) -> ValueError:
        return ValueError(
            f"{self.directory}: {plain(spelling)} and {plain(other.spelling or '')} are the same tensor, "
            "expected one of them"
        )

    def _has(self, piece: Piece) -> bool:
        return piece in self.pieces or replace(piece, expert=0) in self.pieces

    def _has_codes(self, layer: int, projection: str) -> bool:
        return f"{expert_prefix(layer, projection)}_blocks" in self.tensors

    def _orientation(self) -> bool | None:
        """Whether weights lie as [K, rows]. Square ones don't tell (20b's `down`): one answer for the whole checkpoint.

        None if no weight tells: then stacked ones are transposed, as in transformers, and single ones not.
        """
        told = set()
        for piece, info in self.pieces.items():
            rows, k = part_shape(piece.part, self.sizes)
            if not piece.bias and rows != k and info.shape[-2:] in ((rows, k), (k, rows)):
                told.add(info.shape[-2:] == (k, rows))
        if len(told) > 1:
            raise ValueError(
                f"{self.directory}: some experts' weights lie as [K, rows] and some as [rows, K], expected one way"
            )
        return told.pop() if told else None

    def _is_transposed(self, piece: Piece) -> bool:
        return piece.expert is None if self.transposed is None else self.transposed

    def _wrong(self) -> Iterator[str]:
        """One line for each tensor that is missing or has another dtype or shape."""
        for name, expected in self.required.items():
            if ".experts." in name:
                continue
            if name not in self.tensors:
                yield f"{name} ({expected}) missing"
            elif not is_as_required(self.tensors[name], expected):
                yield differs(name, self.tensors[name], expected)
        for layer in range(self.sizes.num_layers):
            for projection in PROJECTIONS:
                yield from self._wrong_experts(layer, projection)
        layers, experts = self.sizes.num_layers, self.sizes.num_experts
        if beyond := [piece for piece in self.pieces if piece.layer >= layers]:
            yield f"experts of layer {max(beyond).layer} found, expected {layers} layers"
        if beyond := [piece for piece in self.pieces if (piece.expert or 0) >= experts]:
            yield f"{plain(self.pieces[beyond[0]].spelling or '')} found, expected {experts} experts"

    def _wrong_experts(self, layer: int, projection: str) -> Iterator[str]:
        name = expert_prefix(layer, projection)
        if self._has_codes(layer, projection):
            for kind in ("blocks", "scales"):
                found, expected = self.tensors.get(f"{name}_{kind}"), self.required[f"{name}_{kind}"]
                if found is None:
                    yield f"{name}_{kind} ({expected}) missing"
                elif not is_as_required(found, expected):
                    yield differs(f"{name}_{kind}", found, expected)
            for piece, info in self.pieces.items():
                if not piece.bias and (piece.layer, piece.projection) == (layer, projection):
                    yield f"{plain(info.spelling or '')} and {name}_blocks are the same weights, expected one of them"
            kinds = [True]
        else:
            kinds = [False, True]
        for bias in kinds:
            parts = ["down"] if projection == "down_proj" else ["gate_up"]
            if projection != "down_proj" and not self._has(Piece(layer, "gate_up", bias=bias)):
                apart = self._has(Piece(layer, "gate", bias=bias)) or self._has(Piece(layer, "up", bias=bias))
                parts = ["gate", "up"] if apart else parts
            for part in parts:
                yield from self._wrong_part(Piece(layer, part, bias=bias), f"{name}{'_bias' if bias else ''}")

    def _wrong_part(self, piece: Piece, name: str) -> Iterator[str]:
        rows, k = part_shape(piece.part, self.sizes)
        experts = self.sizes.num_experts
        stacked = piece in self.pieces
        wanted = [piece] if stacked else [replace(piece, expert=expert) for expert in range(experts)]
        missing = [each for each in wanted if each not in self.pieces]
        if len(missing) == len(wanted):
            yield f"{name} ({piece.part} of {experts} experts) missing"
            return
        if missing:
            yield f"{name} ({piece.part}) of experts {listed([str(each.expert) for each in missing])} missing"
        for each in wanted:
            if each not in self.pieces:
                continue
            shape = (rows,) if piece.bias else (k, rows) if self._is_transposed(each) else (rows, k)
            expected = TensorInfo("BF16", (experts, *shape) if stacked else shape)
            found = self.pieces[each]
            if found.dtype not in SAME_NUMBERS["BF16"] or found.shape != expected.shape:
                yield f"{plain(found.spelling or '')} is {found}, expected {expected}"

    # Reading

    def _part(self, piece: Piece, expert: int) -> Tensor:
        if piece in self.pieces:
            tensor = self._slice(self.pieces[piece], expert)
        else:
            piece = replace(piece, expert=expert)
            tensor = self._read(self.pieces[piece])
        return tensor.T if self._is_transposed(piece) else tensor

    def _published(self, name: str) -> Tensor:
        return as_published(self._read(self.tensors[name]), self.required[name])

    def _read(self, info: TensorInfo) -> Tensor:
        assert info.file is not None and info.spelling is not None
        with open_shard(info.file) as shard:
            tensor: Tensor = shard.get_tensor(info.spelling)
        return tensor

    def _slice(self, info: TensorInfo, index: int) -> Tensor:
        assert info.file is not None and info.spelling is not None
        with open_shard(info.file) as shard:
            part: Tensor = shard.get_slice(info.spelling)[index]
        return part

    def _slice_rows(self, info: TensorInfo) -> Tensor:
        tensor = self._read(info)
        return tensor[slice(*info.rows)] if info.rows else tensor

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        check_finite(name, tensor)
        return tensor


def packed_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the quantization_config that OpenAI's checkpoints have, and the dtype of what is written.

    vLLM serves MXFP4 experts in BF16 alone: a file that said float16 would be refused.
    """
    dtypes = {key: "bfloat16" for key in DTYPE_KEYS if key in config}
    return {**config, **dtypes, "quantization_config": published_config("openai/gpt-oss-20b")["quantization_config"]}


def _names(file: Path) -> list[str]:
    with open_shard(file) as shard:
        return list(shard.keys())
