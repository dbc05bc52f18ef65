# SPDX-License-Identifier: Apache-2.0
"""Every backend, in one table: a new one is a file beside this one and an entry here.

Settings, selector and doctor read it, and tests hold docs/backends.md against it. Nothing is imported before it's asked
for.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_mxfp4_sm120.backends.base import Backend

# `Machine.family`: 0 without a GPU, 10 times the major compute capability with one, of cards to come too.
EVERYWHERE = range(0, 10_000)
GPUS = range(10, 10_000)


@dataclass(frozen=True)
class Entry:
    """`path` is "module:Class" in this package.

    `families` are those in which "auto" may choose it, none if it's only used when asked for by name. `not_yet` are
    those of them for which its kernels don't exist up to now: nothing that a start need mention, doctor does.
    `moe_backend`: vLLM's --moe-backend has the same name.
    """

    name: str
    path: str
    families: Container[int] = ()
    not_yet: Container[int] = ()
    moe_backend: bool = False

    @property
    def automatic(self) -> bool:
        """May "auto" choose it anywhere?"""
        return self.families != ()


# In the order in which they are tried: the fastest first.
REGISTRY = (
    Entry("flashinfer_trtllm", "flashinfer_trtllm:FlashInferTrtllm", (100, 120), not_yet=(120,), moe_backend=True),
    Entry("flashinfer_trtllm_mxfp8", "flashinfer_trtllm:FlashInferTrtllmMxfp8"),  # rounds the activations
    Entry("native", "native:Native", GPUS),
    Entry("triton", "triton:Triton", GPUS, moe_backend=True),
    Entry("tiled", "tiled:Tiled", EVERYWHERE),
    Entry("upcast", "upcast:Upcast"),  # gives up what this plugin is for
)

NAMES = tuple(entry.name for entry in REGISTRY)
MOE_BACKENDS = tuple(entry.name for entry in REGISTRY if entry.moe_backend)


def find(name: str) -> Entry:
    """The entry of that name. Raises KeyError."""
    return {entry.name: entry for entry in REGISTRY}[name]


def automatic(family: int) -> tuple[str, ...]:
    """What "auto" tries on cards of that family, the best first."""
    return tuple(entry.name for entry in REGISTRY if family in entry.families)


@lru_cache
def load(name: str) -> type[Backend]:
    """The backend's class. Backends import what they need late, so this works without CUDA, Triton and FlashInfer."""
    module, _, qualname = find(name).path.partition(":")
    backend: type[Backend] = getattr(import_module(f"{__package__}.{module}"), qualname)
    return backend
