# SPDX-License-Identifier: Apache-2.0
"""Whether `--quantization TEXT` means this plugin: vLLM serves a GPT-OSS under any unknown name with its own method."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from vllm_mxfp4_sm120 import NAME

# Two names that share so much are one name and its misspelling: mxfp4_sm121 and mxfp4_sm120 share 0.91, mxfp4 0.63.
ALIKE = 0.8


def means_us(asked: str | None, others: Iterable[str]) -> bool:
    """True for our name in any case, with hyphens or without separators.

    Raises ValueError for a misspelling of it, unless it is one of the `others`, names that mean something else.
    """
    if asked is None or (asked != NAME and asked in others):
        return False
    plain = asked.lower().replace("-", "").replace("_", "")
    if plain == NAME.replace("_", ""):
        return True
    if difflib.SequenceMatcher(None, plain, NAME.replace("_", "")).ratio() >= ALIKE:
        raise ValueError(f"--quantization {asked} is no quantization method: did you mean {NAME}?")
    return False
