# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's folder, opened and checked before a weight is read; then its experts, a layer at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_mxfp4_sm120.checkpoint.config import Sizes, check_config, undeclared
from vllm_mxfp4_sm120.checkpoint.headers import open_shard, read_headers, read_json
from vllm_mxfp4_sm120.checkpoint.names import EMBEDDING, LM_HEAD, canonical_name, layer_of, plain, refuse_foreign
from vllm_mxfp4_sm120.checkpoint.tensors import (
    UNMATCHED,
    FiniteCheck,
    TensorInfo,
    as_published,
    check_complete,
    differs,
    expert_prefix,
    expert_tensors,
    is_as_required,
    listed,
    required_tensors,
    split_fused,
)
from vllm_mxfp4_sm120.moe import MoEWeights


class Checkpoint:
    """A checkpoint's folder, checked from config.json and the safetensors headers; no weights are read yet.

    `config` is what is served where that isn't config.json (`--hf-overrides`). `tensors` holds what GPT-OSS has tensors
    for, by its published name; `renamed` what has another name in its file.

    Raises ValueError from the constructor, on one line that names the file and what was expected: no folder that can be
    read, not GPT-OSS, not MXFP4, a value of config.json that would be served wrongly (`check_config`), whatever
    `read_headers` refuses, another kind of checkpoint (`refuse_foreign`), tensors that are missing or of another dtype
    or shape. For `--load-format dummy`, which needs no weights, call `check_config` instead.
    """

    def __init__(self, directory: str | Path, config: Mapping[str, Any] | None = None) -> None:
        self.directory = Path(directory)
        source = str(self.directory / "config.json")
        if config is None or not self.directory.is_dir():
            config = read_json(self.directory / "config.json")
        self.config = config
        self.sizes = Sizes.from_config(config, source)
        headers = read_headers(self.directory)
        refuse_foreign(headers, self.directory)
        required = required_tensors(config, source)
        self.tensors = self._published(headers, required)
        if config.get("quantization_config") is None and f"{expert_prefix(0, 'down_proj')}_blocks" in self.tensors:
            raise undeclared(source)
        self.packing = check_config(config, source)
        self._check(required)

    @property
    def renamed(self) -> dict[str, str]:
        """Published name -> name in its file, for tensors whose names differ."""
        return {name: info.spelling for name, info in self.tensors.items() if info.spelling is not None}

    def read_layer(self, layer: int, device: torch.device | str = "cpu") -> MoEWeights:
        """One layer's experts. Raises ValueError for scales that are NaN and biases that aren't finite."""
        weights = MoEWeights.empty(self.sizes.layer, device)
        finite, expected = FiniteCheck(), expert_tensors(self.sizes, layer)
        for name, target in experts_by_name(weights, layer).items():
            tensor = as_published(self.read(name), expected[name])
            finite.add(name, tensor)
            target.copy_(tensor.view(target.shape))
        finite.finish()
        try:
            weights.scale_outside()
        except ValueError as error:
            raise ValueError(f"{expert_prefix(layer, '')}{error}") from None
        return weights

    def read(self, name: str) -> Tensor:
        """One tensor by its published name, as its file holds it."""
        info = self.tensors[name]
        assert info.file is not None
        with open_shard(info.file) as shard:
            tensor: Tensor = shard.get_tensor(info.spelling or name)
        return tensor[slice(*info.rows)] if info.rows else tensor

    def _published(
        self, headers: Mapping[str, TensorInfo], required: Mapping[str, TensorInfo]
    ) -> dict[str, TensorInfo]:
        """The tensors that GPT-OSS has, by their published names."""
        tensors: dict[str, TensorInfo] = {}
        for spelling, header in headers.items():
            published = canonical_name(spelling)
            if published is None:
                continue
            for name, info in split_fused(published, header, required).items():
                if name in tensors:
                    other = tensors[name].spelling or name
                    raise ValueError(
                        f"{header.file}: {plain(spelling)} and {plain(other)} are the same tensor, expected one of them"
                    )
                other_name = None if spelling == name else spelling
                tensors[name] = TensorInfo(info.dtype, info.shape, header.file, other_name, info.rows)
        return tensors

    def _check(self, required: Mapping[str, TensorInfo]) -> None:
        """Every tensor's name, dtype and shape; all that is wrong is said at once."""
        layers = {layer for name in self.tensors if (layer := layer_of(name)) is not None}
        if layers and layers != set(range(self.sizes.num_layers)) and layers == set(range(len(layers))):
            raise ValueError(
                f"{self.directory}: holds {len(layers)} layers, but num_hidden_layers is {self.sizes.num_layers}; "
                f"{UNMATCHED}"
            )
        if beyond := sorted(layers - set(range(self.sizes.num_layers))):
            raise ValueError(
                f"{self.directory}: holds a layer {beyond[0]}, but num_hidden_layers is {self.sizes.num_layers}; "
                f"{UNMATCHED}"
            )
        check_complete(self.tensors, required, self.directory)
        known = {LM_HEAD: required[EMBEDDING], **required}
        bad = [
            (info.file, differs(name, info, known[name]))
            for name, info in self.tensors.items()
            if name in known and not is_as_required(info, known[name])
        ]
        if bad:
            raise ValueError(f"{bad[0][0]}: {listed([text for _, text in bad], '; ')}; {UNMATCHED}")


def experts_by_name(weights: MoEWeights, layer: int) -> dict[str, Tensor]:
    """The tensors of one layer under the names they have on disk (shapes still as in memory)."""
    fields = {
        "gate_up_proj": (weights.w13, weights.w13_scale, weights.w13_bias),
        "down_proj": (weights.w2, weights.w2_scale, weights.w2_bias),
    }
    return {
        f"{expert_prefix(layer, projection)}_{kind}": tensor
        for projection, tensors in fields.items()
        for kind, tensor in zip(("blocks", "scales", "bias"), tensors, strict=True)
        if tensor is not None
    }
