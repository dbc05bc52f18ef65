# SPDX-License-Identifier: Apache-2.0
"""One layer's experts on their way from the checkpoint: this rank's part of each tensor, exactly, and once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_mxfp4_sm120.moe import MoEShape, MoEWeights
from vllm_mxfp4_sm120.mxfp4 import BLOCK

# The fields of MoEWeights by the ends of the published names.
PUBLISHED = {
    "gate_up_proj_blocks": "w13",
    "gate_up_proj_scales": "w13_scale",
    "gate_up_proj_bias": "w13_bias",
    "down_proj_blocks": "w2",
    "down_proj_scales": "w2_scale",
    "down_proj_bias": "w2_bias",
}
# The fields by vLLM's names of the parameters, as GPT-OSS's loader looks for them.
PARAMETERS = {
    "w13_weight": "w13",
    "w13_weight_scale": "w13_scale",
    "w13_bias": "w13_bias",
    "w2_weight": "w2",
    "w2_weight_scale": "w2_scale",
    "w2_bias": "w2_bias",
}
PARAMETER_OF = {field: parameter for parameter, field in PARAMETERS.items()}


@dataclass(frozen=True)
class Shard:
    """What of a layer one rank holds.

    `experts`, by their global ids in local order, and of each the columns `start` to `stop` of the intermediate size,
    a multiple of 32 (none where there are fewer blocks than ranks).
    """

    experts: tuple[int, ...]
    start: int
    stop: int

    @classmethod
    def of(cls, expert_map: Tensor | None, num_experts: int, intermediate_size: int, room: int, rank: int) -> Shard:
        """Rank `rank` of those that share each expert, each with `room` columns for its part.

        expert_map int [num_experts] -> local id or -1; None where all experts are here.
        """
        places = range(num_experts) if expert_map is None else expert_map.tolist()
        experts = sorted((local, expert) for expert, local in enumerate(places) if local >= 0)
        start = min(rank * room, intermediate_size)
        return cls(tuple(expert for _, expert in experts), start, min(start + room, intermediate_size))

    def part(self, field: str, tensor: Tensor) -> Tensor:
        """This rank's part of a published tensor [E, ...], without a copy where its experts are neighbours.

        blocks come as [E, rows, K/32, 16] and leave as [local, rows, K/2]. The first of the ranks that add their
        answers up adds down_proj's bias; the others get zeros.
        """
        if not self.experts:
            tensor = tensor[:0]
        elif self.experts == tuple(range(self.experts[0], self.experts[-1] + 1)):
            tensor = tensor[self.experts[0] : self.experts[-1] + 1]
        else:
            tensor = tensor[torch.tensor(self.experts, device=tensor.device)]
        if field == "w2_bias":
            return tensor if self.start == 0 and self.stop > 0 else torch.zeros_like(tensor)
        if field.startswith("w13"):
            tensor = tensor[:, 2 * self.start : 2 * self.stop]
        else:
            tensor = tensor[:, :, self.start // BLOCK : self.stop // BLOCK]
        return tensor.flatten(2) if tensor.dim() == 4 else tensor

    def extent(self, field: str, shape: MoEShape) -> tuple[int, ...]:
        """The exact shape of that part."""
        size = self.stop - self.start
        hidden, local = shape.hidden_size, shape.local_experts
        return {
            "w13": (local, 2 * size, hidden // 2),
            "w13_scale": (local, 2 * size, hidden // BLOCK),
            "w13_bias": (local, 2 * size),
            "w2": (local, hidden, size // 2),
            "w2_scale": (local, hidden, size // BLOCK),
            "w2_bias": (local, hidden),
        }[field]


class Loader:
    """Fills one layer's parameters and remembers which: `finish` wants every one."""

    def __init__(self, layer_name: str, shape: MoEShape, shard: Shard) -> None:
        self.layer_name, self.shape, self.shard = layer_name, shape, shard
        self.loaded: set[str] = set()

    def of(self, field: str) -> Callable[..., bool | None]:
        """The weight_loader of one parameter.

        It takes what `Shard.part` makes, which is also what vLLM's own loader cuts out; raises ValueError for any other
        dtype or shape, and for a second time.
        """

        def load(
            param: torch.nn.Parameter,
            loaded_weight: Tensor,
            weight_name: str = "",
            shard_id: str | None = None,
            expert_id: int | None = None,
            return_success: bool = False,
        ) -> bool | None:
            self._copy(field, param, loaded_weight, f"{self.layer_name} {weight_name or field}")
            return True if return_success else None

        return load

    def _copy(self, field: str, param: torch.nn.Parameter, part: Tensor, name: str) -> None:
        target, extent = param.data, self.shard.extent(field, self.shape)
        if part.dtype != target.dtype or tuple(part.shape) != extent:
            raise ValueError(
                f"{name}: got {part.dtype} {list(part.shape)} for this rank, expected {target.dtype} {list(extent)}; "
                "the checkpoint does not match its config.json"
            )
        if not target.is_meta:  # there, vLLM only counts what is going to be loaded
            if field in self.loaded:
                raise ValueError(f"{name} was loaded twice, expected once")
            self.loaded.add(field)
            if target.shape != part.shape:
                target.zero_()  # what lies behind a short shard must add nothing, and memory may hold anything
        # Expert by expert: all of them aren't contiguous (MoEWeights.empty), and torch copies to what isn't through a
        # second tensor on the GPU, 1 GiB for a 120b layer.
        for expert, loaded in zip(target, part, strict=True):
            expert[tuple(slice(size) for size in loaded.shape)].copy_(loaded)

    @property
    def complete(self) -> bool:
        return len(self.loaded) == len(PUBLISHED)

    def finish(self) -> None:
        """Ready for the next time. Raises ValueError, naming what was not loaded."""
        missing = [name for name, field in PUBLISHED.items() if field not in self.loaded]
        self.loaded = set()
        if missing:
            raise ValueError(
                f"{self.layer_name}.{', '.join(missing)} not loaded, expected all of a layer's experts together"
            )


def parameters(weights: MoEWeights, loader: Loader) -> dict[str, torch.nn.Parameter]:
    """The weights as parameters by vLLM's names, each with what fills it."""
    made = {}
    for name, field in PARAMETERS.items():
        parameter = torch.nn.Parameter(getattr(weights, field), requires_grad=False)
        parameter.weight_loader = loader.of(field)  # type: ignore[attr-defined]
        # How many elements vLLM waits for before it calls a layer loaded anew.
        extent = torch.Size(loader.shard.extent(field, loader.shape))
        parameter.weight_loader_numel = extent.numel()  # type: ignore[attr-defined]
        made[name] = parameter
    return made
