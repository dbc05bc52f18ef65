# SPDX-License-Identifier: Apache-2.0
"""The library's kernels for the FP4 tensor cores of SM 12.x, activations as FP4 terms: which there are, and where."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from vllm_mxfp4_sm120.backends.native import library


@dataclass(frozen=True)
class Configuration:
    """One entry of the library's table of FP4 kernels; an entry's place is the op's `config`."""

    name: str
    terms: int  # FP4 numbers whose sum an activation is
    tokens: int  # of a token block
    threads: int
    shared_bytes: int


@lru_cache
def configurations() -> tuple[Configuration, ...]:
    """Empty where the library has no FP4 kernels. The library must be loaded."""
    return tuple(Configuration(*entry) for entry in zip(*torch.ops.mxfp4_sm120.fp4_configurations(), strict=True))


def architectures() -> str:
    """The GPUs that they are compiled for, as of `library.load`; "" where there are none. It must be loaded."""
    try:
        return str(torch.ops.mxfp4_sm120.fp4_architectures())
    except AttributeError:  # a library of an earlier version
        return ""


def why_not(capability: tuple[int, int] | None) -> str | None:
    """Why a GPU can't run the FP4 kernels of the loaded library, in one line; None if it can."""
    built = architectures()
    if not built:
        return "the CUDA library has no FP4 kernels: they take nvcc 12.8 or newer, and a build for SM 12.x"
    if capability is None:
        return "it needs an NVIDIA GPU"
    if not library.covers(built, capability):
        return f"the FP4 kernels are built for {built}, not for sm_{capability[0]}{capability[1]}"
    return None
