# SPDX-License-Identifier: Apache-2.0
"""Writing a checkpoint in the published layout, whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vllm_mxfp4_sm120 import mxfp4
from vllm_mxfp4_sm120.checkpoint.headers import INDEX
from vllm_mxfp4_sm120.checkpoint.read import experts_by_name
from vllm_mxfp4_sm120.drafts import expect_new, naming
from vllm_mxfp4_sm120.moe import MoEWeights

# A writer holds one shard while SAVERS more are on their way: copying into the page cache can take a core 3 s for a GB.
SHARD_BYTES = 1 << 30
SAVERS = 4


def save(tensors: dict[str, Tensor], file: Path) -> None:
    """A shard. Raises OSError, naming the file, where it can't be written whole."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        if system := re.search(r"os error (\d+)", str(error)):  # such as a full disk
            raise OSError(int(system[1]), os.strerror(int(system[1])), str(file)) from error
        raise OSError(f"{file}: {error}") from error


@dataclass
class Writer:
    """Writes a checkpoint shard by shard, and lets it appear under its name only when it is whole.

    As a context manager: everything goes to a hidden directory beside `directory`, which takes its name at the end, or
    is removed if anything failed. Raises ValueError if `directory` exists and is not an empty directory.
    Memory: at most SAVERS + 1 times `shard_bytes` of tensors, or a tensor's if that is larger.
    """

    directory: Path
    shard_bytes: int = SHARD_BYTES
    _pending: dict[str, Tensor] = field(default_factory=dict, init=False)
    _savers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(SAVERS), init=False)
    _saving: list[Future[None]] = field(default_factory=list, init=False)
    _weight_map: dict[str, int] = field(default_factory=dict, init=False)
    _shards: int = field(default=0, init=False)
    _bytes: int = field(default=0, init=False)

    def __enter__(self) -> Writer:
        self.directory = Path(self.directory).absolute()
        expect_new(self.directory)
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        # mkdtemp's folder is for its owner only; the checkpoint in it gets the modes that the umask gives.
        self._private = Path(tempfile.mkdtemp(prefix=f".{self.directory.name}.", dir=self.directory.parent))
        self.draft = self._private / self.directory.name
        self.draft.mkdir()
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """One tensor of the checkpoint. Raises ValueError if that name was already added, OSError for a full disk."""
        if name in self._weight_map or name in self._pending:
            raise ValueError(f"{self.directory}: tensor {name} was added twice, expected once")
        if self._pending and sum(t.nbytes for t in self._pending.values()) + tensor.nbytes > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor

    def add_experts(self, layer: int, weights: MoEWeights) -> None:
        """One layer's experts, under their published names and in their published shapes."""
        for name, tensor in experts_by_name(weights, layer).items():
            shape = (-1, mxfp4.BLOCK // 2) if name.endswith("_blocks") else (tensor.shape[-1],)
            self.add(name, tensor.unflatten(-1, shape))

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """A JSON file of the checkpoint, such as config.json. Raises OSError."""
        with naming(self.directory / name):
            (self.draft / name).write_text(json.dumps(value, indent=2) + "\n")

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                with naming(self.directory):
                    self._finish()
        finally:
            self._savers.shutdown(cancel_futures=True)
            shutil.rmtree(self._private, ignore_errors=True)

    def _flush(self) -> None:
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self._pending.items()}
        if len(self._saving) == SAVERS:
            with naming(self.directory):
                self._saving.pop(0).result()
        file = self.draft / f"{self._shards}.safetensors"
        self._saving.append(self._savers.submit(save, tensors, file))
        self._weight_map |= dict.fromkeys(tensors, self._shards)
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())
        self._shards += 1
        self._pending.clear()

    def _finish(self) -> None:
        if self._pending:
            self._flush()
        for saved in self._saving:
            saved.result()
        names = [f"model-{i + 1:05}-of-{self._shards:05}.safetensors" for i in range(self._shards)]
        index = {
            "metadata": {"total_size": self._bytes},
            "weight_map": {t: names[i] for t, i in self._weight_map.items()},
        }
        self.write_json(INDEX, index)
        mode = (self.draft / INDEX).stat().st_mode
        for i, name in enumerate(names):
            (self.draft / f"{i}.safetensors").rename(self.draft / name)
            (self.draft / name).chmod(mode)  # safetensors writes for the owner only
        self.draft.rename(self.directory)
