# SPDX-License-Identifier: Apache-2.0
"""Everything that is wrong with a checkpoint, at once; what loads stops at the first.

Headers may come from a folder or, by HTTP, from a repository of Hugging Face: config.json and names, dtypes and shapes
of its tensors, no weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_mxfp4_sm120.checkpoint.config import Sizes, check_config, undeclared
from vllm_mxfp4_sm120.checkpoint.headers import read_json, survey_headers
from vllm_mxfp4_sm120.checkpoint.names import EMBEDDING, LM_HEAD, canonical_name, plain, refuse_foreign
from vllm_mxfp4_sm120.checkpoint.tensors import TensorInfo, differs, is_as_required, required_tensors, split_fused


@dataclass(frozen=True)
class Survey:
    """What a checkpoint holds. `headers` is None where there are none (offline, and nothing is cached).

    `faults` are lines about files that can't be read, or that don't belong to the index.
    """

    source: str
    config: dict[str, Any]
    headers: Mapping[str, TensorInfo] | None
    faults: list[str] = field(default_factory=list)

    @property
    def layout(self) -> str:
        """What its experts are: mxfp4, bf16, none where there are none, or unknown without headers."""
        if self.headers is None:
            return "unknown"
        names = [canonical_name(name) or name for name in self.headers]
        if any(name.endswith("_proj_blocks") for name in names):
            return "mxfp4"
        return "bf16" if any(".experts." in name for name in names) else "none"

    def problems(self) -> list[str]:
        """One line each: faults, config.json's, and of every tensor that is missing, foreign, doubled or unfit."""
        source = f"{self.source}/config.json"
        found = self.faults + list(_refused(lambda: self._check_config(source)))
        try:
            required = required_tensors(self.config, source)
        except ValueError:
            return found  # said already: without sizes there is nothing to compare with
        return found + ([] if self.headers is None else list(_tensors(self.headers, required)))

    def _check_config(self, source: str) -> None:
        if self.layout == "mxfp4" and self.config.get("quantization_config") is None:
            raise undeclared(source)
        check_config(self.config, source)


def _refused(check: Callable[[], object]) -> Iterator[str]:
    try:
        check()
    except ValueError as error:
        yield str(error)


def _tensors(headers: Mapping[str, TensorInfo], required: Mapping[str, TensorInfo]) -> Iterator[str]:
    known = {LM_HEAD: required[EMBEDDING], **required}
    seen: dict[str, str] = {}
    for spelling, header in headers.items():
        published = canonical_name(spelling)
        if published is None:
            yield from _refused(lambda spelling=spelling: refuse_foreign([spelling], "checkpoint"))  # type: ignore[misc]
            continue
        for name, info in split_fused(published, header, required).items():
            if name not in known:
                yield f"{plain(spelling)}: config.json knows no such tensor"
            elif name in seen:
                yield f"{plain(spelling)} and {plain(seen[name])} are the same tensor, expected one of them"
            elif not is_as_required(info, known[name]):
                yield differs(name, info, known[name])
            seen[name] = spelling
    for name, info in required.items():
        if name not in seen:
            yield f"{name} ({info}) missing"


def survey(path_or_repository: str) -> Survey:
    """A checkpoint's folder, or a repository of Hugging Face ("openai/gpt-oss-20b"): from the cache, else by HTTP.

    Raises ValueError if there is neither, if it's something else, or if config.json or a header can't be read.
    """
    folder = Path(path_or_repository)
    if what := something_else(folder):
        raise ValueError(f"{folder}: {what}")
    if folder.is_dir() or path_or_repository.count("/") != 1 or path_or_repository.startswith((".", "/", "~")):
        return _folder(folder, str(folder))
    cached = _cached(path_or_repository)
    return _remote(path_or_repository) if cached is None else _folder(cached, path_or_repository)


def something_else(path: Path) -> str | None:
    """What people take for a GPT-OSS's folder that isn't one, and what to give instead; None for all others."""
    if path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))):
        return "GGUF, which llama.cpp reads; expected a folder with config.json and *.safetensors"
    if path.is_file():
        return f"a file, expected a checkpoint's folder; give {path.absolute().parent}"
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        return "a LoRA without its model; mxfp4-sm120 pack MODEL DST --adapter LORA merges and packs both"
    if path.is_dir() and not any(path.iterdir()):
        return "an empty folder, expected a checkpoint"
    if (snapshots := sorted((path / "snapshots").glob("*/config.json"))) and not (path / "config.json").exists():
        return f"what Hugging Face's cache keeps of a model, expected one snapshot; give {snapshots[-1].parent}"
    if path.is_dir() and any(path.glob("*.bin")) and not any(path.glob("*.safetensors")):
        return "weights as pickles (*.bin), expected *.safetensors; load it with transformers and save it again"
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        if "experts_per_token" in config and "model_type" not in config:
            return "its config.json is OpenAI's own, expected transformers'; give the folder in which 'original' lies"
    return None


def _folder(folder: Path, source: str) -> Survey:
    config = read_json(folder / "config.json")
    Sizes.from_config(config, f"{folder}/config.json")  # of another model, whatever its weights lie in
    return Survey(source, config, *survey_headers(folder))


def _cached(repository: str) -> Path | None:
    """The snapshot's folder, if its config.json and its weights were fetched before."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if (folder / "config.json").exists() and any(folder.glob("*.safetensors")) else None


def _remote(repository: str) -> Survey:
    """Ranges of the files' first bytes, some 100 KB of a model of 60 GB."""
    from huggingface_hub import constants, get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, NotASafetensorsRepoError

    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{repository}: no such folder, and not in Hugging Face's cache; go online, or give a folder")
    try:
        config = read_json(Path(hf_hub_download(repository, "config.json")))
        metadata = get_safetensors_metadata(repository)
    except NotASafetensorsRepoError as error:
        raise ValueError(f"{repository}: no *.safetensors there, expected the model's weights") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(f"{repository}: {str(error).splitlines()[0]}; give a folder that is here") from error
    headers = {
        name: TensorInfo(info.dtype, tuple(info.shape), Path(file))
        for file, shard in metadata.files_metadata.items()
        for name, info in shard.tensors.items()
    }
    return Survey(repository, config, headers)
