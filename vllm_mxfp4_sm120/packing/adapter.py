# SPDX-License-Identifier: Apache-2.0
"""A LoRA adapter's folder as PEFT saves it, merged into the weights while they are read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vllm_mxfp4_sm120.checkpoint.config import Sizes, shown
from vllm_mxfp4_sm120.checkpoint.headers import open_shard, read_json
from vllm_mxfp4_sm120.checkpoint.names import canonical_name, plain, respelled
from vllm_mxfp4_sm120.checkpoint.tensors import TensorInfo, is_as_required, listed
from vllm_mxfp4_sm120.packing.names import Piece, part_shape, piece_of, without_peft

FILE = "adapter_model.safetensors"
MERGE_FIRST = "merge it with PEFT's merge_and_unload, save the model, and pack that"
# Settings of a LoRA that change what is added, and what each must be.
PLAIN = {
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "megatron_config": None,
    "layer_replication": None,
}
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<letter>[AB])(?:\.\w+)?\.weight")
# A published weight, one expert's piece, or a layer's projection of all experts.
Target = str | Piece | tuple[int, str]
_ALL_EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts")


class Adapter:
    """weight + (alpha / r) B A for every weight that the adapter has factors of; what it holds whole is replaced.

    Factors A [r, K] and B [rows, r] belong to a linear layer. Those of all experts in one (PEFT's target_parameters)
    are A [E r, K], expert after expert, and B [rows, r E], where the expert changes fastest.
    Raises ValueError from the constructor for a tensor that can't be merged, and for settings beyond plain LoRA.
    """

    def __init__(self, directory: str | Path, sizes: Sizes, required: Mapping[str, TensorInfo]) -> None:
        self.file = Path(directory) / FILE
        self.sizes = sizes
        self.scaling = _scaling(
            read_json(Path(directory) / "adapter_config.json", "a LoRA's as PEFT saves it"), self.file.parent
        )
        self.pairs: dict[Target, dict[str, str]] = {}
        self.whole: dict[str, str] = {}
        self._last: tuple[tuple[str, str], tuple[Tensor, Tensor]] | None = None
        with open_shard(self.file) as shard:
            shapes = {name: TensorInfo.of(shard.get_tensor(name)) for name in shard.keys()}  # noqa: SIM118
        unknown = [name for name in shapes if not self._place(name, shapes, required)]
        unknown += [f"{key} without its other factor" for key, pair in self.pairs.items() if set(pair) != {"A", "B"}]
        if not shapes:
            raise ValueError(f"{self.file}: holds no tensors, expected a LoRA's; save the adapter again")
        if unknown:
            raise ValueError(f"{self.file}: can't merge {listed([plain(name) for name in unknown])}; {MERGE_FIRST}")
        self._check_shapes(shapes, required)

    def _place(self, name: str, shapes: Mapping[str, TensorInfo], required: Mapping[str, TensorInfo]) -> bool:
        bare = without_peft(name.replace(".modules_to_save", ""))
        factor = _FACTOR.fullmatch(bare)
        if factor is None:
            published = canonical_name(bare)
            if published is None or published not in required or published.endswith(("_blocks", "_scales")):
                return False
            self.whole[published] = name
            return is_as_required(shapes[name], required[published])
        key = self._target(factor["module"], name, shapes, required)
        if key is not None:
            self.pairs.setdefault(key, {})[factor["letter"]] = name
        return key is not None

    def _target(
        self, module: str, name: str, shapes: Mapping[str, TensorInfo], required: Mapping[str, TensorInfo]
    ) -> Target | None:
        """What a factor is added to."""
        piece = piece_of(f"{module}.weight")
        if piece is not None:
            known = piece.layer < self.sizes.num_layers and (piece.expert or 0) < self.sizes.num_experts
            return piece if piece.expert is not None and known else None
        everyone = _ALL_EXPERTS.fullmatch(respelled(module))
        if everyone is None:
            published = canonical_name(f"{module}.weight")
            return published if published in required else None
        first, second = (name.replace(".lora_B", ".lora_A"), name.replace(".lora_A", ".lora_B"))
        if first not in shapes or second not in shapes:
            return None
        sizes: Any = (*shapes[second].shape[:1], *shapes[first].shape[1:])
        hidden, intermediate = self.sizes.hidden_size, self.sizes.intermediate_size
        of_sizes = {(2 * intermediate, hidden): "gate_up_proj", (hidden, intermediate): "down_proj"}
        projection = of_sizes.get(sizes)
        known = int(everyone[1]) < self.sizes.num_layers
        return (int(everyone[1]), projection) if projection is not None and known else None

    def _check_shapes(self, shapes: Mapping[str, TensorInfo], required: Mapping[str, TensorInfo]) -> None:
        for key, pair in self.pairs.items():
            a, b = shapes[pair["A"]].shape, shapes[pair["B"]].shape
            ranks = 1 if isinstance(key, str | Piece) else self.sizes.num_experts  # in one factor, one beside another
            made = (b[0], a[1]) if len(a) == len(b) == 2 and a[0] == b[1] and a[0] % ranks == 0 else None
            if isinstance(key, str):
                expected = required[key].shape
            elif isinstance(key, Piece):
                expected = part_shape(key.part, self.sizes)
            else:
                expected = part_shape("down" if key[1] == "down_proj" else "gate_up", self.sizes)
            if made != expected:
                made_of = f"the factors {list(a)} and {list(b)} of {plain(pair['A'])}"
                raise ValueError(
                    f"{self.file}: {made_of} don't make {list(expected)}; the adapter is not of this model"
                )

    def touches(self, layer: int, projection: str) -> bool:
        """Whether any of the projection's experts has factors."""
        return (layer, projection) in self.pairs or any(
            isinstance(key, Piece) and (key.layer, key.projection) == (layer, projection) for key in self.pairs
        )

    def replacement(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor, or what the adapter has in its place."""
        return self._read(self.whole[name]) if name in self.whole else tensor

    def merge(self, name: str, tensor: Tensor) -> Tensor:
        """A published tensor that isn't of the experts, float32 if anything was added."""
        tensor = self.replacement(name, tensor)
        if name not in self.pairs:
            return tensor
        a, b = self._factors(name)
        return self._added(tensor, b @ a)

    def merge_expert(self, layer: int, projection: str, expert: int, weights: Tensor) -> Tensor:
        """One expert's weights [rows, K], float32 if anything was added."""
        if (layer, projection) in self.pairs:
            a, b = self._factors((layer, projection))
            experts = self.sizes.num_experts
            of_expert = b.unflatten(1, (-1, experts))[:, :, expert], a.unflatten(0, (experts, -1))[expert]
            weights = self._added(weights, of_expert[0] @ of_expert[1])
        parts = {"down": slice(None)}
        if projection == "gate_up_proj":
            parts = {"gate_up": slice(None), "gate": slice(0, None, 2), "up": slice(1, None, 2)}
        for part, rows in parts.items():
            piece = Piece(layer, part, expert)
            if piece in self.pairs:
                a, b = self._factors(piece)
                weights = weights.float()
                weights[rows] = self._added(weights[rows], b @ a)
        return weights

    def _added(self, tensor: Tensor, product: Tensor) -> Tensor:
        return tensor.float() + self.scaling * product.to(tensor.device)

    def _factors(self, key: Target) -> tuple[Tensor, Tensor]:
        names = self.pairs[key]["A"], self.pairs[key]["B"]
        if self._last is None or self._last[0] != names:  # one pair serves all experts of a layer
            self._last = names, (self._read(names[0]).float(), self._read(names[1]).float())
        return self._last[1]

    def _read(self, name: str) -> Tensor:
        with open_shard(self.file) as shard:
            tensor: Tensor = shard.get_tensor(name)
        return tensor


def _scaling(config: Mapping[str, Any], directory: Path) -> float:
    kind, rank, alpha = config.get("peft_type"), config.get("r"), config.get("lora_alpha")
    if kind != "LORA":
        raise ValueError(f"{directory}: peft_type is {shown(kind)}, expected 'LORA'; {MERGE_FIRST}")
    for key, plain_value in PLAIN.items():
        if config.get(key) not in (plain_value, None):
            raise ValueError(f"{directory}: {key} is {shown(config[key])}, expected {plain_value}; {MERGE_FIRST}")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise ValueError(f"{directory}: r is {shown(rank)} and lora_alpha {shown(alpha)}, expected numbers")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
