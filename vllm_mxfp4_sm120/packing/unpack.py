# SPDX-License-Identifier: Apache-2.0
"""Packed MXFP4 experts back to a BF16 GPT-OSS in transformers' layout, for training or other tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_mxfp4_sm120 import __version__, mxfp4
from vllm_mxfp4_sm120.checkpoint.tensors import expert_prefix
from vllm_mxfp4_sm120.packing import files
from vllm_mxfp4_sm120.packing.draft import SHARD_BYTES, Job, Made, Unit, write
from vllm_mxfp4_sm120.packing.manifest import Progress
from vllm_mxfp4_sm120.packing.pack import copied, rest_of
from vllm_mxfp4_sm120.packing.source import KNOWN_SCALES, PROJECTIONS, Source


def unpack(
    source_directory: Path,
    directory: Path,
    device: torch.device | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda *_: None,
) -> None:
    """Write the BF16 checkpoint to `directory`, which must be new or empty, as `draft.write` does. Exact.

    Several blocks may hold the same numbers with different scales, so where `mxfp4.quantize` wouldn't find a block's
    scale again, the projection's scales are kept beside the model, in files that its index doesn't name: `pack` then
    gives the same bytes back. Raises ValueError if the experts aren't packed, and for values beyond BF16's range.
    """
    source = Source(source_directory)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for layer in range(source.sizes.num_layers):
        for projection in PROJECTIONS:
            if not source.is_packed(layer, projection):
                raise ValueError(
                    f"{source.directory}: {expert_prefix(layer, projection)} isn't packed, expected MXFP4 blocks and "
                    "scales; there is nothing to unpack"
                )
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}

    def finish(draft: Path, reports: list[dict[str, Any]]) -> None:
        files.copy_rest(source.directory, draft)
        (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        Source(draft)  # whole, and `pack` takes it

    what = {"unpacked by": __version__, "source": files.identity(source.directory), "shard_bytes": shard_bytes}
    units = list(_units(source, device))
    write(Path(directory), Job(units, what, finish, KNOWN_SCALES.replace("*.safetensors", "{}"), shard_bytes), progress)


def _units(source: Source, device: torch.device) -> Iterator[Unit]:
    for layer in (None, *range(source.sizes.num_layers)):
        yield from (copied(source, name) for name in rest_of(source, layer))
        for projection in PROJECTIONS if layer is not None else ():
            blocks = source.required[f"{expert_prefix(layer, projection)}_blocks"].shape
            size = 2 * blocks[0] * blocks[1] * (blocks[2] * mxfp4.BLOCK + 1)

            def make(layer: int = layer, projection: str = projection) -> Made:
                return _unpack_projection(source, layer, projection, device)

            yield Unit(expert_prefix(layer, projection), size, make)


def _unpack_projection(source: Source, layer: int, projection: str, device: torch.device) -> Made:
    prefix = expert_prefix(layer, projection)
    _, scales = source.packed(layer, projection)
    experts, rows, blocks = scales.shape
    weights = torch.empty(experts, blocks * mxfp4.BLOCK, rows, dtype=torch.bfloat16)
    found_again = True
    for expert in range(experts):
        values = source.weights(layer, projection, expert, device)
        weights[expert].copy_(values.T)
        found_again &= torch.equal(mxfp4.block_scales(values).cpu(), scales[expert])
    beside: dict[str, Tensor] = {} if found_again else {f"{prefix}_scales": scales.contiguous()}
    return Made({prefix: weights, f"{prefix}_bias": source.bias(layer, projection).contiguous()}, beside)
