# SPDX-License-Identifier: Apache-2.0
"""Every environment variable of this plugin, in one table. Values are read when asked for, never at import."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

PREFIX = "MXFP4_SM120_"
T = TypeVar("T", covariant=True)


@dataclass(frozen=True)
class Kind(Generic[T]):
    """How a variable's text becomes a value: `parse` raises ValueError for what is not `accepted`."""

    accepted: str
    parse: Callable[[str], T]


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One environment variable. Unset or empty means `default`."""

    name: str
    kind: Kind[T]
    default: T
    meaning: str

    def get(self) -> T:
        """The value now. Raises ValueError naming the variable, its value and what is accepted."""
        text = os.environ.get(self.name, "").strip()
        if not text:
            return self.default
        try:
            return self.kind.parse(text)
        except ValueError:
            raise ValueError(f"{self.name}={text!r} is not accepted: expected {self.kind.accepted}") from None


def _one_of(*words: str) -> Kind[str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError
        return text

    return Kind(words[0] if len(words) == 1 else f"one of {', '.join(words)}", parse)


def _integer(low: int, high: int) -> Kind[int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            raise ValueError
        return int(text)

    return Kind(str(low) if low == high else f"an integer from {low} to {high}", parse)


_FLAG = Kind("0 or 1", lambda text: _one_of("0", "1").parse(text) == "1")

BACKEND = Variable(
    "MXFP4_SM120_BACKEND",
    _one_of("auto", "flashinfer_trtllm", "flashinfer_trtllm_mxfp8", "native", "triton", "tiled", "upcast"),
    "auto",
    "the backend of the experts; auto takes the first that works on this machine",
)
WEIGHTONLY = Variable(
    "MXFP4_SM120_WEIGHTONLY", _FLAG, True, "0 upcasts all experts to BF16 at load, for comparison: BACKEND=upcast"
)
GROUP_SIZE: Variable[int | None] = Variable(
    "MXFP4_SM120_GROUP_SIZE",
    _integer(32, 32),
    None,
    "values that share a scale, in place of what config.json says",
)
PACK_LAYOUT: Variable[str | None] = Variable(
    "MXFP4_SM120_PACK_LAYOUT",
    _one_of("low_nibble_first"),
    None,
    "how two codes share a byte, in place of what config.json says",
)
USE_TRITON = Variable("MXFP4_SM120_USE_TRITON", _FLAG, False, "1 tries the Triton backend before all others")
DISABLE_TRITON_MOE = Variable("MXFP4_SM120_DISABLE_TRITON_MOE", _FLAG, False, "1 leaves the Triton backend out")
MOE_STREAMS = Variable(
    "MXFP4_SM120_MOE_STREAMS", _integer(1, 32), 1, "CUDA streams over which the tiled backend spreads a layer's experts"
)
ALLOW_STUB_KERNEL = Variable(
    "MXFP4_SM120_ALLOW_STUB_KERNEL", _FLAG, False, "1 lets a native library without GPU code load, to test the loading"
)
FORCE_UPCAST = Variable("MXFP4_SM120_FORCE_UPCAST", _FLAG, False, "1 allows the upcast backend on SM120 and newer")
BASE_GPU_ID = Variable(
    "MXFP4_SM120_BASE_GPU_ID", _integer(0, 1023), 0, "index of the first visible GPU that this server uses"
)
DEBUG_EMPTY_CACHE = Variable(
    "MXFP4_SM120_DEBUG_EMPTY_CACHE",
    _FLAG,
    False,
    "1 empties CUDA's cache after every tiled layer, to see the real peak",
)
VALIDATE_GATE = Variable(
    "MXFP4_SM120_VALIDATE_GATE",
    _FLAG,
    False,
    "1 checks that each token's gates sum to 1, and waits for the GPU to do so",
)
AUTO = Variable(
    "MXFP4_SM120_AUTO",
    _FLAG,
    True,
    "0 serves only what --quantization mxfp4_sm120 asks for, claims no checkpoint itself",
)
ANY_VLLM = Variable(
    "MXFP4_SM120_ANY_VLLM", _FLAG, False, "1 tries a vLLM that this version of the plugin was not written for"
)
PROOF = Variable(
    "MXFP4_SM120_PROOF", _FLAG, True, "0 trusts a backend without a small problem solved on this machine first"
)
PROOF_SECONDS = Variable(
    "MXFP4_SM120_PROOF_SECONDS",
    _integer(1, 3600),
    300,
    "seconds after which a backend that has not solved it is left out",
)
CACHE_DIR: Variable[str | None] = Variable(
    "MXFP4_SM120_CACHE_DIR",
    Kind("a directory", str),
    None,
    "where solved problems are remembered; by default vllm_mxfp4_sm120 in XDG_CACHE_HOME or ~/.cache",
)
BUILD: Variable[bool | None] = Variable(
    "MXFP4_SM120_BUILD",
    _FLAG,
    None,
    "while installing: 0 leaves the CUDA library out, 1 builds it for every card; by default for this machine's GPU",
)

TABLE: tuple[Variable, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Variable))


def check() -> None:
    """Read every variable, so that a bad one stops the start and not a request later.

    Raises ValueError for a value that is not accepted and for an unknown MXFP4_SM120_* name.
    """
    known = [variable.name for variable in TABLE]
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise ValueError(f"{name} is not a variable of this plugin: did you mean {nearest}?")
    for variable in TABLE:
        variable.get()
