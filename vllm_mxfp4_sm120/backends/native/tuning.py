# SPDX-License-Identifier: Apache-2.0
"""Hands the library its rule: which of its kernels computes how many tokens on a device."""

from __future__ import annotations

from functools import lru_cache

import torch

from vllm_mxfp4_sm120.backends import tuning
from vllm_mxfp4_sm120.backends.native import library
from vllm_mxfp4_sm120.backends.tuning import Bound, Family, Found, Rule


@lru_cache
def hand_over(device: torch.device) -> None:
    """Tell the library, once, the rule of the device where weights lie.

    For weights on the CPU, which may yet move, the rules of all devices. Raises ValueError for a shipped rule with a
    kernel that the library doesn't have.
    """
    if device.type == "cuda":
        indices = [torch.cuda.current_device() if device.index is None else device.index]
    else:
        indices = list(range(torch.cuda.device_count()))
        set_rule(-1, (Bound(library.configurations()[0].name),))  # the CPU's, for the stub: it computes nothing
    for index in indices:
        set_rule(index, tuning.say(found(torch.cuda.get_device_name(index))))


def found(card: str) -> Found:
    """The rule for a card. The library must be loaded. Raises ValueError as `tuning.find`."""
    return tuning.find(card, Family.NATIVE, library.version(), check)


def check(rule: Rule, name: str) -> None:
    """Raises ValueError for a kernel that the library doesn't have; `name` is the rule's file."""
    kernels = [config.name for config in library.configurations()]
    for bound in rule:
        if bound.kernel not in kernels:
            raise ValueError(f"{name}: {bound.kernel!r} is no kernel of {library.LIBRARY.name}: {', '.join(kernels)}")


def set_rule(device: int, rule: Rule) -> None:
    """Its kernels exist (`check`)."""
    kernels = [config.name for config in library.configurations()]
    torch.ops.mxfp4_sm120.set_rule(
        device,
        [kernels.index(bound.kernel) for bound in rule],
        [bound.tokens for bound in rule],
        [bound.tokens_per_expert for bound in rule],
    )
