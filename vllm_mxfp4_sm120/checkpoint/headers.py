# SPDX-License-Identifier: Apache-2.0
"""What lies in a checkpoint's folder: JSON files, the index, and the headers of its shards. No weight is read."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vllm_mxfp4_sm120.checkpoint.config import shown
from vllm_mxfp4_sm120.checkpoint.names import plain
from vllm_mxfp4_sm120.checkpoint.tensors import TensorInfo, listed

INDEX = "model.safetensors.index.json"
# The index of a model of 100,000 tensors has 10 MB. More is no index, and Python's parser would take ten times as much.
JSON_BYTES = 64 << 20
NAME_CHARACTERS = 255  # that file systems take
LFS_POINTER = b"version https://git-lfs.github.com/spec"


def read_json(path: Path, expected: str | None = None) -> dict[str, Any]:
    """A JSON object of the checkpoint, or what else was `expected`. Raises ValueError, naming the file, for no such."""
    size = _regular_size(path, expected or f"a checkpoint's {path.name}")
    if size > JSON_BYTES:
        raise ValueError(f"{path}: {size} bytes, expected a JSON file of at most {JSON_BYTES}")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    if text.startswith(LFS_POINTER):
        raise _lfs_pointer(path)
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except _DuplicateKey as error:
        raise ValueError(f"{path}: {shown(error.args[0])} stands there twice, expected once; mend the file") from error
    except (ValueError, RecursionError) as error:
        deep = "nested too deeply" if isinstance(error, RecursionError) else "not JSON"
        raise ValueError(f"{path}: {deep}; fetch the checkpoint again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds {type(value).__name__}, expected a JSON object; fetch the checkpoint again")
    return value


class _DuplicateKey(Exception):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise _DuplicateKey(key)
        value[key] = item
    return value


def read_headers(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of every shard that vLLM would load, by its name in the file.

    Those are the shards that the index names, or without an index every *.safetensors. Raises ValueError, naming the
    file: no shards; an index that names something else than files of the folder, or a tensor that its shard doesn't
    hold; a shard that is missing, damaged, empty, a git-lfs pointer or no file; a tensor in two shards.
    """
    weight_map, files = _shards(directory)
    absent = [file.name for file in files if not os.path.lexists(file)]
    if len(absent) > 1:  # a download that was stopped; of one alone `open_shard` says more
        raise ValueError(
            f"{directory}: {listed(absent)} missing, of {len(files)} shards that the index names; "
            "fetch the checkpoint again"
        )

    def refuse(fault: ValueError) -> None:
        raise fault

    return _collect(directory, weight_map, files, refuse)


def survey_headers(directory: Path) -> tuple[dict[str, TensorInfo], list[str]]:
    """What `read_headers` gives, of every shard that can be read, and what it would refuse, a line each.

    Raises ValueError as `read_headers` does where the index can't be used, or not one shard can be read.
    """
    faults: list[str] = []
    tensors = _collect(directory, *_shards(directory), lambda fault: faults.append(str(fault)))
    return tensors or read_headers(directory), faults


def _shards(directory: Path) -> tuple[dict[str, str], list[Path]]:
    """The index, if there is one, and the files that it names or, without one, that are there."""
    index = directory / INDEX
    weight_map = _weight_map(index) if os.path.lexists(index) else {}
    files = [directory / name for name in sorted(set(weight_map.values()))]
    files = files or sorted(directory.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{directory}: no *.safetensors here, expected the model's weights; fetch the checkpoint again"
        )
    return weight_map, files


def _collect(
    directory: Path, weight_map: Mapping[str, str], files: Sequence[Path], refuse: Callable[[ValueError], None]
) -> dict[str, TensorInfo]:
    """The tensors of all files; what is wrong with one goes to `refuse`."""
    tensors: dict[str, TensorInfo] = {}
    unread = set()
    for file in files:
        try:
            _add_shard(tensors, file, refuse)
        except ValueError as fault:
            unread.add(file)
            refuse(fault)
    for name, shard_name in weight_map.items():
        file = directory / shard_name
        if file not in unread and (name not in tensors or tensors[name].file != file):
            refuse(
                ValueError(
                    f"{directory / INDEX}: says that {plain(name)} lies in {shard_name}, which doesn't hold it; "
                    "index and shards don't belong together, fetch both again"
                )
            )
    return tensors


def _add_shard(tensors: dict[str, TensorInfo], file: Path, refuse: Callable[[ValueError], None]) -> None:
    """Raises ValueError where the file can't be read."""
    with open_shard(file) as shard:
        for name in shard.keys():  # noqa: SIM118 (not a dict)
            if name in tensors:
                refuse(
                    ValueError(
                        f"{file}: holds {plain(name)}, which {tensors[name].file} holds, too; remove the file that is "
                        "not of this model"
                    )
                )
                continue
            view = shard.get_slice(name)
            tensors[name] = TensorInfo(view.get_dtype(), tuple(view.get_shape()), file)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{index}: weight_map is {shown(weight_map)}, expected an object of tensors and their files; "
            "fetch the checkpoint again"
        )
    for name, file in weight_map.items():
        # vLLM, too, looks for shards in the folder itself only; nothing outside it is touched.
        plain_name = isinstance(file, str) and file.isprintable() and "/" not in file and "\\" not in file
        if not plain_name or not file.endswith(".safetensors") or len(file) > NAME_CHARACTERS:
            raise ValueError(
                f"{index}: the file of {plain(name)} is {shown(file)}, expected the name of a *.safetensors file "
                "beside the index"
            )
    return weight_map


@contextmanager
def open_shard(file: Path) -> Iterator[Any]:
    """The shard, its header checked against the file's size by the library. Raises ValueError, naming the file."""
    size = _regular_size(file, "a shard of the checkpoint")
    try:
        with file.open("rb") as opened:
            start = opened.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise _lfs_pointer(file)
        shard = safe_open(file, "pt")
    except OSError as error:
        raise _unreadable(file, error) from error
    except SafetensorError as error:
        raise ValueError(
            f"{file}: cut short or damaged at {size} bytes, expected a whole safetensors file; fetch it again"
        ) from error
    with shard as opened_shard:
        yield opened_shard


def _regular_size(path: Path, expected: str) -> int:
    """Of a regular file; anything else, a pipe for one, might never answer."""
    try:
        status = path.stat()
    except FileNotFoundError as error:
        if not path.parent.is_dir():
            raise ValueError(f"{path.parent}: no such directory, expected one that holds a checkpoint") from error
        dangling = path.is_symlink()
        what = f"points to {os.readlink(path)}, which isn't there" if dangling else "no such file"
        raise ValueError(f"{path}: {what}, expected {expected}; fetch it again") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: not a regular file, expected {expected}")
    return status.st_size


def _unreadable(path: Path, error: OSError) -> ValueError:
    reason = (error.strerror or "unreadable").lower()
    return ValueError(f"{path}: {reason}, expected a readable checkpoint")


def _lfs_pointer(path: Path) -> ValueError:
    return ValueError(f"{path}: a git-lfs pointer, expected the file itself; run git lfs pull")
