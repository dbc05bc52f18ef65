# SPDX-License-Identifier: Apache-2.0
"""MXFP4 GPT-OSS experts for vLLM, packed from disk to tensor core."""

from pathlib import Path

# What vLLM calls the quantization method, and its tables this plugin.
NAME = "mxfp4_sm120"
__version__ = "0.2.0"


def config_path(*parts: str) -> Path:
    """A file of configs/, which lies inside the package when installed and beside it in the repository."""
    here = Path(__file__).parent
    inside = here / "configs"
    return (inside if inside.is_dir() else here.parent / "configs").joinpath(*parts)
