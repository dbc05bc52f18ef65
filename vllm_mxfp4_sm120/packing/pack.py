# SPDX-License-Identifier: Apache-2.0
"""A BF16 GPT-OSS to the published layout with MXFP4 experts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_mxfp4_sm120 import __version__
from vllm_mxfp4_sm120.checkpoint import Checkpoint, TensorInfo
from vllm_mxfp4_sm120.checkpoint.names import layer_of
from vllm_mxfp4_sm120.checkpoint.tensors import expert_prefix
from vllm_mxfp4_sm120.packing import files
from vllm_mxfp4_sm120.packing.draft import SHARD_BYTES, Job, Made, Unit, write
from vllm_mxfp4_sm120.packing.encode import Error, encode
from vllm_mxfp4_sm120.packing.manifest import Progress
from vllm_mxfp4_sm120.packing.source import PROJECTIONS, Source

BYTES = {"U8": 1, "BF16": 2}


@dataclass(frozen=True)
class Options:
    """`search`: the best of neighbouring scales for each block. `adapter`: the folder of a LoRA to merge.

    `moments`: for each projection of each layer, the mean squares [E, K] of what its weights are multiplied by; the
    search weighs errors by them. `text` says what they were measured on, so that a run goes on with no others: they
    themselves differ a little from run to run on a GPU. `device` computes, the GPU if there is one.
    """

    search: bool = False
    adapter: Path | None = None
    moments: dict[str, Tensor] = field(default_factory=dict)
    text: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True)
class ProjectionError:
    """How far a layer's packed projection is from its floats; None where it came packed and was copied."""

    layer: int
    projection: str
    relative_rms: float | None
    sqnr_db: float | None


@dataclass(frozen=True)
class Report:
    """`left_out` are tensors of the source that GPT-OSS has no place for; `tokenizer` is whether there was one."""

    directory: str
    projections: list[ProjectionError]
    left_out: list[str]
    tokenizer: bool


def pack(
    source_directory: Path, directory: Path, options: Options | None = None, progress: Progress = lambda *_: None
) -> Report:
    """Write the packed checkpoint to `directory`, which must be new or empty, as `draft.write` does.

    Takes memory for a shard and one expert. Raises ValueError as `Source` and `draft.write` do, and for weights that
    aren't finite; draft.Stopped for Ctrl-C.
    """
    options = options or Options()
    source = Source(source_directory, options.adapter)
    directory = Path(directory)

    def finish(draft: Path, reports: list[dict[str, Any]]) -> None:
        files.copy_rest(source.directory, draft)
        if options.adapter is not None:
            files.copy_rest(Path(options.adapter), draft, tokenizer_only=True)
        _write(draft / "config.json", source.config)
        _write(draft / files.REPORT, {"version": __version__, "search": options.search, "projections": reports})
        Checkpoint(draft)  # as it will be loaded

    what = {"packed by": __version__, "source": files.identity(source.directory), "search": options.search}
    what["adapter"] = None if options.adapter is None else files.identity(Path(options.adapter))
    what["text"] = options.text
    what["shard_bytes"] = options.shard_bytes
    job = Job(list(_units(source, options)), what, finish, shard_bytes=options.shard_bytes)
    reports = write(directory, job, progress)
    projections = [ProjectionError(**report) for report in reports]
    return Report(str(directory), projections, source.left_out, any(directory.glob("tokenizer*")))


def _units(source: Source, options: Options) -> Iterator[Unit]:
    """In the model's order: embedding and output layer, then layer after layer."""
    for layer in (None, *range(source.sizes.num_layers)):
        yield from (copied(source, name) for name in rest_of(source, layer))
        for projection in PROJECTIONS if layer is not None else ():
            prefix = expert_prefix(layer, projection)
            infos = [source.required[f"{prefix}_{kind}"] for kind in ("blocks", "scales", "bias")]

            def make(layer: int = layer, projection: str = projection) -> Made:
                return _pack_projection(source, layer, projection, options)

            yield Unit(prefix, sum(map(nbytes, infos)), make)


def rest_of(source: Source, layer: int | None) -> list[str]:
    """The layer's tensors that aren't of the experts, or with None those of no layer."""
    return [name for name in source.tensors if ".experts." not in name and layer_of(name) == layer]


def nbytes(info: TensorInfo) -> int:
    """Of a tensor in the published layout."""
    return math.prod(info.shape) * BYTES.get(info.dtype, 2)


def copied(source: Source, name: str) -> Unit:
    """A tensor that isn't of the experts."""
    size = nbytes(source.required.get(name, source.tensors[name]))
    return Unit(name, size, lambda: Made({name: source.rest(name).contiguous()}))


def _pack_projection(source: Source, layer: int, projection: str, options: Options) -> Made:
    prefix = expert_prefix(layer, projection)
    error = None
    if source.is_packed(layer, projection):
        blocks, scales = source.packed(layer, projection)
    else:
        blocks = torch.empty(source.required[f"{prefix}_blocks"].shape, dtype=torch.uint8)
        scales = torch.empty(source.required[f"{prefix}_scales"].shape, dtype=torch.uint8)
        known, moments = source.known_scales(layer, projection), options.moments.get(prefix)
        error = Error()
        for expert in range(source.sizes.num_experts):
            codes, scale, of_expert = encode(
                source.weights(layer, projection, expert, options.device),
                None if known is None else known[expert].to(options.device),
                options.search,
                None if moments is None else moments[expert].to(options.device),
            )
            blocks[expert].copy_(codes.view(blocks.shape[1:]))
            scales[expert].copy_(scale)
            error += of_expert
    report = ProjectionError(
        layer,
        projection,
        None if error is None else error.relative_rms,
        error.sqnr_db if error is not None and error.squared else None,
    )
    bias = source.bias(layer, projection)
    tensors = {f"{prefix}_blocks": blocks, f"{prefix}_scales": scales, f"{prefix}_bias": bias}
    return Made({name: tensor.contiguous() for name, tensor in tensors.items()}, report=asdict(report))


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
