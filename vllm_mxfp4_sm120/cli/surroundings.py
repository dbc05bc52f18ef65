# SPDX-License-Identifier: Apache-2.0
"""What `doctor` asks outside its own process: other Pythons, and vLLM for the attention that it would take."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ENTRY_POINT = ("vllm.general_plugins", "mxfp4_sm120")
DISTRIBUTION = "vllm-mxfp4-sm120"

# Run by another Python, whichever it is.
WHO_IS_THERE = """
import json
from importlib import metadata
def version(name):
    try:
        return metadata.version(name)
    except Exception:
        return None
print(json.dumps([version("vllm"), version("vllm-mxfp4-sm120")]))
"""

# vLLM's own answer, for GPT-OSS: heads of 64, sinks, a sliding window in every other layer.
WHICH_ATTENTION = """
import json, torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.selector import AttentionSelectorConfig
asked = dict(head_size=64, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=16, has_sink=True,
             has_sliding_window=True)
config = AttentionSelectorConfig(**asked)
with set_current_vllm_config(VllmConfig()):
    name = current_platform.get_attn_backend_cls(None, config, 64).rpartition(".")[2]
    refused = {}
    if current_platform.is_cuda():
        capability = current_platform.get_device_capability()
        _, reasons = current_platform.get_valid_backends(capability, config, 64)
        refused = {backend.name: "; ".join(why) for backend, (_, why) in reasons.items()}
print("\\n" + json.dumps([name, refused]))
"""


@dataclass(frozen=True)
class Python:
    """An interpreter, and the versions of vLLM and of this plugin that it has; None for what it hasn't."""

    executable: str
    vllm: str | None
    plugin: str | None


@dataclass(frozen=True)
class Attention:
    """The backend that vLLM takes for GPT-OSS's attention here, and why none of those that it would rather take."""

    name: str | None
    refused: dict[str, str]
    why_unknown: str | None = None


def why_not_found() -> str | None:
    """One line saying why the vLLM of this Python won't load this plugin; None if it will, or isn't there."""
    group, name = ENTRY_POINT
    found = metadata.entry_points(group=group, name=name)
    if not found:
        return (
            f"vLLM won't find this plugin: {DISTRIBUTION} is not installed for {sys.executable} (pip install it there)"
        )
    owners = {point.dist.name for point in found if point.dist is not None}
    if DISTRIBUTION not in owners:
        return f"vLLM's plugin {name} is that of {', '.join(sorted(owners))}, not of {DISTRIBUTION}"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and name not in allowed.split(","):
        return f"VLLM_PLUGINS={allowed} keeps vLLM from loading this plugin: add {name} to it"
    return None


def other_pythons() -> list[Python]:
    """Those that the shell would start (python3, python, the one of `vllm`) and that aren't this one."""
    named = [shutil.which("python3"), shutil.which("python"), _interpreter(shutil.which("vllm"))]
    here = {sys.prefix}
    found = []
    for executable in dict.fromkeys(filter(None, named)):
        prefix = _output([executable, "-c", "import sys; print(sys.prefix)"], 20)
        if prefix is None or prefix.strip() in here:
            continue
        here.add(prefix.strip())
        try:
            vllm, plugin = json.loads(_output([executable, "-c", WHO_IS_THERE], 20) or "")
        except (ValueError, TypeError):
            continue
        found.append(Python(executable, vllm, plugin))
    return found


def attention() -> Attention:
    """Asked in a process of its own: importing vLLM takes seconds, and may fail in its own ways."""
    said = _output([sys.executable, "-c", WHICH_ATTENTION], 120)
    try:
        name, refused = json.loads((said or "").strip().splitlines()[-1])
    except (ValueError, TypeError, IndexError):
        return Attention(None, {}, "this vLLM could not be asked")
    return Attention(name, refused)


def _interpreter(script: str | None) -> str | None:
    """That of a script's first line."""
    if script is None:
        return None
    try:
        with Path(script).open("rb") as opened:
            first = opened.readline(1000)
    except OSError:
        return None
    words = first[2:].decode(errors="replace").split() if first.startswith(b"#!") else []
    return words[0] if words and "python" in words[0] else None


def _output(command: list[str], seconds: float) -> str | None:
    """What a program printed; None if it failed. It finds no modules in the working directory."""
    try:
        done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=seconds, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout
