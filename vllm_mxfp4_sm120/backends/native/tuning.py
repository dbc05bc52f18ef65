# SPDX-License-Identifier: Apache-2.0
"""Which of the library's kernels computes how many tokens: rules measured on a card, in configs/tuning."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from vllm_mxfp4_sm120 import config_path
from vllm_mxfp4_sm120.backends.native import library


@dataclass(frozen=True)
class Bound:
    """One line of a rule: the kernel for up to so many tokens, and so many per expert on average."""

    kernel: str
    tokens: float = float("inf")
    tokens_per_expert: float = float("inf")


def rule_path(card: str) -> Path:
    """configs/tuning/<the card's name>.json, or default.json where nobody has tuned for it."""
    path = config_path("tuning", re.sub(r"\W+", "_", card) + ".json")
    return path if path.exists() else path.with_name("default.json")


def read(path: Path) -> tuple[Bound, ...]:
    """{"rule": [{"kernel": "...", "tokens": 8}, {"kernel": "...", "tokens_per_expert": 24}, {"kernel": "..."}]}.

    The first line that holds is taken. Raises ValueError where a line says anything else, or the last one leaves
    some calls out.
    """
    try:
        rule = tuple(Bound(**entry) for entry in json.loads(path.read_text())["rule"])
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name} is no rule: {error}") from error
    if not rule or rule[-1] != Bound(rule[-1].kernel):
        raise ValueError(f"{path.name}: the last line of its rule has a bound, expected a kernel for all other calls")
    return rule


@lru_cache
def hand_over(device: torch.device) -> None:
    """Tell the library, once, the rule of the device where weights lie.

    For weights on the CPU, which may yet move, the rules of all devices. Raises ValueError for a kernel that the
    library doesn't have.
    """
    if device.type == "cuda":
        indices = [torch.cuda.current_device() if device.index is None else device.index]
    else:
        indices = list(range(torch.cuda.device_count()))
        _set_rule(-1, (Bound(library.configurations()[0].name),), "the CPU's rule")  # for the stub: it computes nothing
    for index in indices:
        path = rule_path(torch.cuda.get_device_name(index))
        _set_rule(index, read(path), path.name)


def _set_rule(device: int, rule: tuple[Bound, ...], name: str) -> None:
    kernels = [config.name for config in library.configurations()]
    for bound in rule:
        if bound.kernel not in kernels:
            raise ValueError(f"{name}: {bound.kernel} is no kernel of {library.LIBRARY.name}: {', '.join(kernels)}")
    torch.ops.mxfp4_sm120.set_rule(
        device,
        [kernels.index(bound.kernel) for bound in rule],
        [bound.tokens for bound in rule],
        [bound.tokens_per_expert for bound in rule],
    )
