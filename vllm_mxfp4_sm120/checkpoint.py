"""GPT-OSS checkpoints on disk: what config.json says, what the experts must look like, checked reading, whole writing.

Under model.layers.N.mlp.experts lie gate_up_proj (rows = 2I, gate and up alternating; K = H) and down_proj (rows = H,
K = I), each as NAME_blocks uint8 [E, rows, K/32, 16], NAME_scales uint8 [E, rows, K/32] and NAME_bias bf16 [E, rows].
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_mxfp4_sm120 import config_path, envs, mxfp4
from vllm_mxfp4_sm120.moe import MoEShape, MoEWeights

MODEL_TYPE = "gpt_oss"
# What published checkpoints say, what vLLM rewrites it to, and what the user may have asked for.
QUANT_METHODS = ("mxfp4", "gpt_oss_mxfp4", "mxfp4_sm120")
PACK_LAYOUT = "low_nibble_first"  # the published one: of a byte's two codes, the earlier is in the low nibble
INDEX = "model.safetensors.index.json"
# A writer holds one shard while SAVERS more are on their way: copying into the page cache can take a core 3 s for a GB.
SHARD_BYTES = 1 << 30
SAVERS = 4


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
        config = quantization_config or {}
        method = config.get("quant_method")
        if method not in QUANT_METHODS:
            raise ValueError(
                f"{source}: quant_method is {method!r}, expected 'mxfp4'; this plugin serves packed MXFP4 experts only"
            )
        group_size, pack_layout = _overrides()
        group_size = config.get("group_size", mxfp4.BLOCK) if group_size is None else group_size
        pack_layout = config.get("pack_layout", PACK_LAYOUT) if pack_layout is None else pack_layout
        if group_size != mxfp4.BLOCK:
            raise ValueError(
                f"{source}: group_size is {group_size!r}, expected {mxfp4.BLOCK}; "
                f"if the file is wrong, set {envs.GROUP_SIZE.name}={mxfp4.BLOCK}"
            )
        if pack_layout != PACK_LAYOUT:
            raise ValueError(
                f"{source}: pack_layout is {pack_layout!r}, expected {PACK_LAYOUT!r}; "
                f"if the file is wrong, set {envs.PACK_LAYOUT.name}={PACK_LAYOUT}"
            )
        return cls(group_size, pack_layout)


@lru_cache
def _overrides() -> tuple[int | None, str | None]:
    """What the environment says, read once: a process never sees two answers."""
    return envs.GROUP_SIZE.get(), envs.PACK_LAYOUT.get()


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
                f"{source}: model_type is {model_type!r}, expected {MODEL_TYPE!r}; this plugin serves GPT-OSS only"
            )

        def size(key: str, multiple: int = 1) -> int:
            value = config.get(key)
            if type(value) is not int or value <= 0 or value % multiple:
                kind = "a positive integer" if multiple == 1 else f"a positive multiple of {multiple}"
                raise ValueError(f"{source}: {key} is {value!r}, expected {kind}; the file is damaged")
            return value

        return cls(
            num_layers=size("num_hidden_layers"),
            num_experts=size("num_local_experts"),
            hidden_size=size("hidden_size", mxfp4.BLOCK),
            intermediate_size=size("intermediate_size", mxfp4.BLOCK),
            top_k=size("num_experts_per_tok"),
        )

    @property
    def layer(self) -> MoEShape:
        """One whole layer, all its experts on one rank."""
        return MoEShape(self.num_experts, self.num_experts, self.hidden_size, self.intermediate_size, self.top_k)


def published_config(model: str) -> dict[str, Any]:
    """config.json of a published model as far as shapes go: "openai/gpt-oss-20b" or "openai/gpt-oss-120b"."""
    return json.loads(config_path("models", f"{model.rpartition('/')[2]}.json").read_text())


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor; dtypes by the format's own names ("U8", "BF16"...)."""

    dtype: str
    shape: tuple[int, ...]
    file: Path | None = None

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def expert_tensors(sizes: Sizes, layer: int) -> dict[str, TensorInfo]:
    """Name, dtype and shape of each expert tensor that a layer must have."""
    tensors = {}
    experts, hidden, intermediate = sizes.num_experts, sizes.hidden_size, sizes.intermediate_size
    for projection, rows, k in (("gate_up_proj", 2 * intermediate, hidden), ("down_proj", hidden, intermediate)):
        name, blocks = _prefix(layer, projection), k // mxfp4.BLOCK
        tensors[f"{name}_blocks"] = TensorInfo("U8", (experts, rows, blocks, mxfp4.BLOCK // 2))
        tensors[f"{name}_scales"] = TensorInfo("U8", (experts, rows, blocks))
        tensors[f"{name}_bias"] = TensorInfo("BF16", (experts, rows))
    return tensors


def _prefix(layer: int, projection: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{projection}"


def check_scales(name: str, scales: Tensor) -> None:
    """Raises ValueError if any of the scales uint8 [...] is 255, NaN: one bad byte would spread to every token.

    Once, at load: it waits for the device.
    """
    if scales.numel() and int(scales.max()) == mxfp4.NAN_SCALE:
        where = (scales == mxfp4.NAN_SCALE).nonzero()
        raise ValueError(
            f"{name}: {len(where)} of {scales.numel()} scales are 255 (NaN), first at {where[0].tolist()}, "
            "expected 0 to 254; the checkpoint is damaged, fetch it again"
        )


class Checkpoint:
    """A checkpoint directory, opened and checked from config.json and the safetensors headers; no weights are read yet.

    Raises ValueError from the constructor, naming the file and what was expected: not a directory that can be read, not
    GPT-OSS, not MXFP4, a shard that is missing or cut short, an expert tensor missing or of another dtype or shape.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        source = str(self.directory / "config.json")
        self.config = self._read_json("config.json")
        self.sizes = Sizes.from_config(self.config, source)
        self.packing = Packing.from_config(self.config.get("quantization_config"), source)
        self._check_experts()

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor of every shard, from the headers alone."""
        tensors = {}
        for file in self._shards():
            with _open_shard(file) as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dict)
                    view = shard.get_slice(name)
                    tensors[name] = TensorInfo(view.get_dtype(), tuple(view.get_shape()), file)
        return tensors

    def read_layer(self, layer: int, device: torch.device | str = "cpu") -> MoEWeights:
        """One layer's experts. Raises ValueError for scales that are NaN."""
        weights = MoEWeights.empty(self.sizes.layer, device)
        for name, target in _named(weights, layer).items():
            file = self.tensors[name].file
            assert file is not None
            with _open_shard(file) as shard:
                tensor = shard.get_tensor(name)
            if name.endswith("_scales"):
                check_scales(name, tensor)
            target.copy_(tensor.view(target.shape))
        return weights

    def _check_experts(self) -> None:
        for layer in range(self.sizes.num_layers):
            for name, expected in expert_tensors(self.sizes, layer).items():
                found = self.tensors.get(name)
                if found is None:
                    raise ValueError(
                        f"{self.directory}: {name} is missing, expected {expected}; fetch the checkpoint again"
                    )
                if (found.dtype, found.shape) != (expected.dtype, expected.shape):
                    raise ValueError(
                        f"{found.file}: {name} is {found}, expected {expected}; "
                        "config.json and weights don't belong together, fetch the checkpoint again"
                    )

    def _shards(self) -> list[Path]:
        if (self.directory / INDEX).exists():
            weight_map = self._read_json(INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{self.directory / INDEX}: weight_map is absent or empty; fetch the checkpoint again")
            return [self.directory / name for name in sorted(set(weight_map.values()))]
        shards = sorted(self.directory.glob("*.safetensors"))
        if not shards:
            raise ValueError(
                f"{self.directory}: no *.safetensors here, expected the model's weights; fetch the checkpoint again"
            )
        return shards

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        try:
            os.listdir(self.directory)
            value = json.loads(path.read_text())
        except FileNotFoundError as error:
            if self.directory.is_dir():
                raise ValueError(
                    f"{path}: no such file, expected a checkpoint's {name}; is this a model's directory?"
                ) from error
            raise ValueError(f"{self.directory}: no such directory, expected one that holds a checkpoint") from error
        except OSError as error:
            raise ValueError(
                f"{error.filename}: {(error.strerror or 'unreadable').lower()}, expected a readable checkpoint"
            ) from error
        except ValueError as error:
            raise ValueError(f"{path}: not JSON; fetch the checkpoint again") from error
        if not isinstance(value, dict):
            raise ValueError(
                f"{path}: holds {type(value).__name__}, expected a JSON object; fetch the checkpoint again"
            )
        return value


@contextmanager
def _open_shard(file: Path) -> Iterator[Any]:
    """The shard, its header checked against the file's size by the library."""
    try:
        shard = safe_open(file, "pt")
    except FileNotFoundError as error:
        raise ValueError(f"{file}: no such file, expected a shard of the checkpoint; fetch it again") from error
    except OSError as error:
        raise ValueError(f"{file}: can't be read ({error.strerror}); expected a shard of the checkpoint") from error
    except SafetensorError as error:
        size = file.stat().st_size
        raise ValueError(
            f"{file}: cut short or damaged at {size} bytes, expected a whole safetensors file; fetch it again"
        ) from error
    with shard as opened:
        yield opened


def _named(weights: MoEWeights, layer: int) -> dict[str, Tensor]:
    """The tensors of one layer under the names they have on disk (shapes still as in memory)."""
    fields = {
        "gate_up_proj": (weights.w13, weights.w13_scale, weights.w13_bias),
        "down_proj": (weights.w2, weights.w2_scale, weights.w2_bias),
    }
    return {
        f"{_prefix(layer, projection)}_{kind}": tensor
        for projection, tensors in fields.items()
        for kind, tensor in zip(("blocks", "scales", "bias"), tensors, strict=True)
        if tensor is not None
    }


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
        if self.directory.exists() and not (self.directory.is_dir() and not any(self.directory.iterdir())):
            raise ValueError(
                f"{self.directory}: already exists, expected a new name or an empty directory; remove it first"
            )
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        self.draft = Path(tempfile.mkdtemp(prefix=f".{self.directory.name}.", dir=self.directory.parent))
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """One tensor of the checkpoint. Raises ValueError if that name was already added."""
        if name in self._weight_map or name in self._pending:
            raise ValueError(f"{self.directory}: tensor {name} was added twice, expected once")
        if self._pending and sum(t.nbytes for t in self._pending.values()) + tensor.nbytes > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor

    def add_experts(self, layer: int, weights: MoEWeights) -> None:
        """One layer's experts, under their published names and in their published shapes."""
        for name, tensor in _named(weights, layer).items():
            shape = (-1, mxfp4.BLOCK // 2) if name.endswith("_blocks") else (tensor.shape[-1],)
            self.add(name, tensor.unflatten(-1, shape))

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """A JSON file of the checkpoint, such as config.json."""
        (self.draft / name).write_text(json.dumps(value, indent=2) + "\n")

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._savers.shutdown(cancel_futures=True)
            shutil.rmtree(self.draft, ignore_errors=True)

    def _flush(self) -> None:
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self._pending.items()}
        if len(self._saving) == SAVERS:
            self._saving.pop(0).result()
        file = self.draft / f"{self._shards}.safetensors"
        self._saving.append(self._savers.submit(save_file, tensors, file, metadata={"format": "pt"}))
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
        for i, name in enumerate(names):
            (self.draft / f"{i}.safetensors").rename(self.draft / name)
        index = {
            "metadata": {"total_size": self._bytes},
            "weight_map": {t: names[i] for t, i in self._weight_map.items()},
        }
        self.write_json(INDEX, index)
        self.draft.chmod(0o755)  # mkdtemp's directories are for their owner only
        self.draft.rename(self.directory)
