# SPDX-License-Identifier: Apache-2.0
"""Every setting of this plugin, in one table: an environment variable and, of some, a key of --additional-config.

`--additional-config '{"mxfp4_sm120": {"backend": "tiled"}}'` is for one engine, the environment for all of a process.
Values are read when asked for, never at import.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from vllm_mxfp4_sm120 import NAME
from vllm_mxfp4_sm120.backends import registry

PREFIX = "MXFP4_SM120_"
JSON = f"--additional-config {NAME}"
T = TypeVar("T", covariant=True)


@dataclass(frozen=True)
class Kind(Generic[T]):
    """How a variable's text becomes a value: `parse` raises ValueError for what is not `accepted`."""

    accepted: str
    parse: Callable[[str], T]


@dataclass(frozen=True)
class Setting(Generic[T]):
    """One setting. `name` is its environment variable's; unset or empty means `default`.

    With `in_json`, an engine's --additional-config may say it, too.
    """

    name: str
    kind: Kind[T]
    default: T
    meaning: str
    in_json: bool = False

    @property
    def key(self) -> str:
        """What --additional-config calls it: MXFP4_SM120_USE_TRITON is use_triton."""
        return self.name.removeprefix(PREFIX).lower()

    def given(self) -> T | None:
        """What the environment says now, None where it says nothing.

        Raises ValueError naming the variable, its value and what is accepted.
        """
        text = os.environ.get(self.name, "").strip()
        if not text:
            return None
        try:
            return self.kind.parse(text)
        except ValueError:
            raise ValueError(f"{self.name}={text!r} is not accepted: expected {self.kind.accepted}") from None

    def get(self) -> T:
        """What the environment says now, or the default. Raises as `given`."""
        value = self.given()
        return self.default if value is None else value

    def is_said(self, options: Mapping[str, Any]) -> bool:
        """Whether it is the user's wish and not the default."""
        return self.key in options or self.given() is not None

    def said_by(self, options: Mapping[str, Any]) -> str:
        """Where an engine's value comes from, for messages."""
        return f"{JSON} {self.key}" if self.key in options else self.name

    def for_engine(self, options: Mapping[str, Any]) -> T:
        """What `options`, an engine's (`engine_options`), or the environment say, or the default.

        Raises ValueError where the two contradict each other, and as `given`.
        """
        said, wanted = self.given(), options.get(self.key)
        if said is not None and wanted is not None and said != wanted:
            raise ValueError(
                f"{JSON} {self.key} is {str(wanted).lower()} and {self.name}={os.environ[self.name].strip()} says "
                "otherwise; keep one of them"
            )
        return self.get() if wanted is None else wanted


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

BACKEND = Setting(
    "MXFP4_SM120_BACKEND",
    _one_of("auto", *registry.NAMES),
    "auto",
    "the backend of the experts; auto takes the first that works on this machine",
    in_json=True,
)
WEIGHTONLY = Setting(
    "MXFP4_SM120_WEIGHTONLY", _FLAG, True, "0 upcasts all experts to BF16 at load, for comparison: BACKEND=upcast"
)
GROUP_SIZE: Setting[int | None] = Setting(
    "MXFP4_SM120_GROUP_SIZE",
    _integer(32, 32),
    None,
    "values that share a scale, in place of what config.json says",
)
PACK_LAYOUT: Setting[str | None] = Setting(
    "MXFP4_SM120_PACK_LAYOUT",
    _one_of("low_nibble_first"),
    None,
    "how two codes share a byte, in place of what config.json says",
)
USE_TRITON = Setting(
    "MXFP4_SM120_USE_TRITON", _FLAG, False, "1 tries the Triton backend before all others", in_json=True
)
DISABLE_TRITON_MOE = Setting(
    "MXFP4_SM120_DISABLE_TRITON_MOE", _FLAG, False, "1 leaves the Triton backend out", in_json=True
)
DENSE = Setting(
    "MXFP4_SM120_DENSE",
    _one_of("off", "bf16", "int8"),
    "bf16",
    "bf16: kernels for few tokens in attention's projections and lm_head, where they are faster; int8: keeps them, and "
    "the embedding, in 8 bits, too; off: vLLM's own",
    in_json=True,
)
ACTIVATION = Setting(
    "MXFP4_SM120_ACTIVATION",
    _one_of("bf16", "mxfp4x2", "mxfp4x3", "off"),
    "bf16",
    "what the native backend multiplies where FP4 tensor cores are faster; bf16: BF16, or four FP4 terms, which are no "
    "less exact; mxfp4x2, mxfp4x3: two or three terms, which are; off: BF16 everywhere",
    in_json=True,
)
MOE_STREAMS = Setting(
    "MXFP4_SM120_MOE_STREAMS", _integer(1, 32), 1, "CUDA streams over which the tiled backend spreads a layer's experts"
)
ALLOW_STUB_KERNEL = Setting(
    "MXFP4_SM120_ALLOW_STUB_KERNEL", _FLAG, False, "1 lets a native library without GPU code load, to test the loading"
)
FORCE_UPCAST = Setting("MXFP4_SM120_FORCE_UPCAST", _FLAG, False, "1 allows the upcast backend on SM120 and newer")
BASE_GPU_ID = Setting(
    "MXFP4_SM120_BASE_GPU_ID", _integer(0, 1023), 0, "index of the first visible GPU that this server uses"
)
DEBUG_EMPTY_CACHE = Setting(
    "MXFP4_SM120_DEBUG_EMPTY_CACHE",
    _FLAG,
    False,
    "1 empties CUDA's cache after every tiled layer, to see the real peak",
)
VALIDATE_GATE = Setting(
    "MXFP4_SM120_VALIDATE_GATE",
    _FLAG,
    False,
    "1 checks that each token's gates sum to 1, and waits for the GPU to do so",
)
AUTO = Setting(
    "MXFP4_SM120_AUTO",
    _FLAG,
    True,
    "0 serves only what --quantization mxfp4_sm120 asks for, claims no checkpoint itself",
)
ANY_VLLM = Setting(
    "MXFP4_SM120_ANY_VLLM", _FLAG, False, "1 tries a vLLM that this version of the plugin was not written for"
)
PROOF = Setting(
    "MXFP4_SM120_PROOF",
    _FLAG,
    True,
    "0 trusts a backend without a small problem solved on this machine first",
    in_json=True,
)
PROOF_SECONDS = Setting(
    "MXFP4_SM120_PROOF_SECONDS",
    _integer(1, 3600),
    300,
    "seconds after which a backend that has not solved it is left out",
)
CACHE_DIR: Setting[str | None] = Setting(
    "MXFP4_SM120_CACHE_DIR",
    Kind("a directory", str),
    None,
    "where solved problems are remembered, and libraries that `build` can't put into the package; "
    "by default vllm_mxfp4_sm120 in XDG_CACHE_HOME or ~/.cache",
)
BUILD: Setting[bool | None] = Setting(
    "MXFP4_SM120_BUILD",
    _FLAG,
    None,
    "while installing: 0 leaves the CUDA library out, 1 builds it for every card; by default for this machine's GPU",
)

TABLE: tuple[Setting[Any], ...] = tuple(value for value in list(globals().values()) if isinstance(value, Setting))


def check() -> None:
    """Read every variable, so that a bad one stops the start and not a request later.

    Raises ValueError for a value that is not accepted and for an unknown MXFP4_SM120_* name.
    """
    known = [setting.name for setting in TABLE]
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise ValueError(f"{name} is not a variable of this plugin: did you mean {nearest}?")
    for setting in TABLE:
        setting.get()


def engine_options(additional_config: object) -> Mapping[str, Any]:
    """The "mxfp4_sm120" entry of vLLM's --additional-config, empty where there is none.

    Raises ValueError for anything but an object of settings that may stand there, each of its kind.
    """
    given = additional_config.get(NAME, {}) if isinstance(additional_config, Mapping) else {}
    known = {setting.key: setting for setting in TABLE if setting.in_json}
    if not isinstance(given, Mapping):
        raise ValueError(f"{JSON} is {given!r}, expected an object of {', '.join(known)}")
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{JSON} has {key!r}, expected one of {', '.join(known)}")
        _check_json(known[key], value)
    return given


def _check_json(setting: Setting[Any], value: object) -> None:
    """Raises ValueError for a value of JSON that the setting can't have: flags are true or false there."""
    accepted = setting.kind.accepted
    if isinstance(setting.default, bool):
        accepted, right = "true or false", isinstance(value, bool)
    else:
        try:
            right = isinstance(value, str) and setting.kind.parse(value) == value
        except ValueError:
            right = False
    if not right:
        raise ValueError(f"{JSON} {setting.key} is {value!r}, expected {accepted}")
