# SPDX-License-Identifier: Apache-2.0
"""The CUDA library: where it is, whether it runs on a card, its ops, and what it says of its kernels."""

from __future__ import annotations

import hashlib
import re
import stat
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from vllm_mxfp4_sm120 import __version__, settings
from vllm_mxfp4_sm120.cache import cache_dir, others_may_write, owner_trouble
from vllm_mxfp4_sm120.platform import Machine

# Where `pip install` puts it, and `mxfp4-sm120 build` unless it can't write there.
LIBRARY = Path(__file__).parents[2] / "_native.so"
# What makes one, in a checkout and out of it.
REMEDY = "run mxfp4-sm120 build"


@dataclass(frozen=True)
class Limits:
    """What no kernel goes beyond, as kernels/csrc/moe.h says."""

    experts: int
    top_k: int
    size: int  # hidden or intermediate
    tokens: int  # of one launch; more are computed in parts
    router_tokens: int  # for more, the router is a GEMM library's business


@dataclass(frozen=True)
class Configuration:
    """One entry of the library's dispatch table: a name, up to what it takes a call, and what a block of it needs."""

    name: str
    tokens: int
    size: int  # the larger of hidden and intermediate size
    values: int  # tokens * top_k * the larger of hidden and intermediate size
    threads: int
    shared_bytes: int

    def takes(self, tokens: int, top_k: int, size: int) -> bool:
        """Whether a call is within its limits; `size` is the larger of hidden and intermediate size."""
        return tokens <= self.tokens and size <= self.size and tokens * top_k * size <= self.values


def find(capability: tuple[int, int] | None) -> Path | None:
    """The library for a GPU: what `mxfp4-sm120 build` left in the cache directory, else the package's; None if neither.

    Raises PermissionError where others could have written the former.
    """
    return cached(capability) or (LIBRARY if LIBRARY.exists() else None)


def cached(capability: tuple[int, int] | None) -> Path | None:
    """The library in the cache directory, None if there is none. Raises PermissionError where others could write it."""
    path = cache_path(capability)
    try:
        if path is None or not path.parent.is_dir():
            return None
        state = path.lstat()
    except OSError:
        return None
    distrusted = owner_trouble(path, state) or others_may_write(path.parent)
    if not stat.S_ISREG(state.st_mode):
        distrusted = f"{path} is no regular file"
    if distrusted:
        raise PermissionError(f"{distrusted}: no code is loaded from there, remove it and {REMEDY}")
    return path


def cache_path(capability: tuple[int, int] | None) -> Path | None:
    """Where a library lies in the cache directory; None without a GPU or a home directory.

    Its name tells the card, since homes are shared between machines, and the sources, since ops change with them.
    """
    folder = cache_dir()
    if folder is None or capability is None:
        return None
    return folder / "libraries" / f"native-sm_{capability[0]}{capability[1]}-{version()}.so"


def version() -> str:
    """Sixteen hexadecimal digits that change with this package's version and with every source of the library."""
    digest = hashlib.sha256(__version__.encode())
    for source in sorted(sources().glob("csrc/**/*.*")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def sources() -> Path:
    """kernels/, which lies inside the package when installed and beside it in the repository."""
    package = Path(__file__).parents[2]
    inside = package / "kernels"
    return inside if inside.is_dir() else package.parent / "kernels"


def why_not(machine: Machine) -> str | None:
    """One line saying why its kernels can't run on a machine; None if they can, and for a stub that is allowed."""
    try:
        if find(machine.capability) is None:
            needed = "it needs an NVIDIA GPU" if machine.capability is None else None
            return needed or f"the CUDA library isn't built: {REMEDY}"
        architectures = load()
    except (OSError, RuntimeError) as error:
        return f"{LIBRARY.name} can't be used: {error}"
    if architectures == "stub":
        return None
    if machine.capability is None:
        return "it needs an NVIDIA GPU"
    if not covers(architectures, machine.capability):
        return f"{LIBRARY.name} is built for {architectures}, not for {machine.sm}: {REMEDY}"
    return None


def load() -> str:
    """Load the library, once per process; the GPUs it was built for as CMake writes them ("90-real 120-virtual").

    Raises OSError where it can't be loaded, RuntimeError for a stub that MXFP4_SM120_ALLOW_STUB_KERNEL doesn't allow.
    """
    architectures = _load()
    if architectures == "stub" and not settings.ALLOW_STUB_KERNEL.get():
        raise RuntimeError(
            f"it is a stub without GPU code: {REMEDY}, or set {settings.ALLOW_STUB_KERNEL.name}=1 to get zeros"
        )
    return architectures


@lru_cache
def _load() -> str:
    library = find(Machine.here().capability) or LIBRARY
    torch.ops.load_library(library)
    torch.library.register_fake("mxfp4_sm120::moe_layer", _fake_moe_layer)
    torch.library.register_fake("mxfp4_sm120::fp4_moe_layer", _fake_moe_layer)
    torch.library.register_fake("mxfp4_sm120::router_logits", _fake_router_logits)
    torch.library.register_fake("mxfp4_sm120::dense_linear", _fake_dense_linear)
    torch.library.register_fake("mxfp4_sm120::dense_dequantize", _fake_dense_dequantize)
    architectures = str(torch.ops.mxfp4_sm120.architectures())
    if architectures == "stub":
        warnings.warn(f"{library} is a stub: its output is zeros, never an answer", stacklevel=2)
    return architectures


def _fake_moe_layer(x: Tensor, *arguments: object) -> Tensor:
    return torch.empty_like(x)


def _fake_router_logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_dense_linear(x: Tensor, weight: Tensor, *arguments: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_dense_dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(weight, dtype=torch.bfloat16)


@lru_cache
def limits() -> Limits:
    """Of all kernels. The library must be loaded."""
    return Limits(*torch.ops.mxfp4_sm120.limits())


@lru_cache
def configurations() -> tuple[Configuration, ...]:
    """The dispatch table; an entry's place is the ops' `config`. The library must be loaded."""
    return tuple(Configuration(*entry) for entry in zip(*torch.ops.mxfp4_sm120.configurations(), strict=True))


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Can a library built for `architectures` run on a GPU of `capability`?

    Machine code runs on its own and later minors of its major, PTX on everything later; "120a" on 12.0 alone, and
    "120f" on its family: CUDA C++ Programming Guide, compute capabilities.
    """
    for text in architectures.split():
        match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", text)
        if match is None:
            continue
        built, variant, kind = (int(match[1]), int(match[2])), match[3], match[4]
        if variant == "a":
            runs = capability == built
        elif variant == "f" or kind == "-real":
            runs = capability[0] == built[0] and capability >= built
        else:
            runs = capability >= built
        if runs:
            return True
    return False
