# SPDX-License-Identifier: Apache-2.0
"""What lies in a model's folder beside its weights: which of it is kept, and what tells one folder from another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from vllm_mxfp4_sm120.checkpoint.headers import INDEX
from vllm_mxfp4_sm120.packing.manifest import SUMS

REPORT = "mxfp4_packing.json"
# Tokenizer, chat template, generation_config, card and licence; never weights, nor what a trainer needs to go on.
KEPT_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".md", ""}
NOT_KEPT = {
    INDEX,
    SUMS,
    REPORT,
    "config.json",
    "adapter_config.json",
    "trainer_state.json",
    "pytorch_model.bin.index.json",
}
TOKENIZER = ("tokenizer", "chat_template", "special_tokens_map", "added_tokens", "vocab", "merges")


def copy_rest(source: Path, target: Path, tokenizer_only: bool = False) -> None:
    """Copy the files that are kept, one of the same name in `target` being replaced."""
    for file in sorted(source.iterdir()):
        kept = file.suffix in KEPT_SUFFIXES and file.name not in NOT_KEPT and not file.name.startswith(".")
        if kept and file.is_file() and (not tokenizer_only or file.name.startswith(TOKENIZER)):
            shutil.copyfile(file, target / file.name)


def identity(directory: Path) -> dict[str, Any]:
    """Names, sizes and times of a folder's weights and JSON files."""
    files = sorted(file for pattern in ("*.safetensors", "*.json") for file in directory.glob(pattern))
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
