# SPDX-License-Identifier: Apache-2.0
"""Which backend answers: candidates in order, the first that can run and has proved itself, and why not the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module

from vllm_mxfp4_sm120 import envs, proof
from vllm_mxfp4_sm120.backends.base import Backend
from vllm_mxfp4_sm120.moe import MoEShape, MoEWeights
from vllm_mxfp4_sm120.platform import Machine

# Every backend, by the file that holds it. "upcast" is never chosen by itself: it gives up what this plugin is for.
MODULES = {
    "flashinfer_trtllm": "flashinfer_trtllm",
    "flashinfer_trtllm_mxfp8": "flashinfer_trtllm",
    "native": "native",
    "triton": "triton",
    "tiled": "tiled",
    "upcast": "upcast",
}

# Candidates by family, the fastest first. MXFP8 rounds the activations, so it too is only used when asked for.
ORDER = {
    0: ("tiled",),
    80: ("native", "triton", "tiled"),
    90: ("native", "triton", "tiled"),
    100: ("flashinfer_trtllm", "native", "triton", "tiled"),
    120: ("flashinfer_trtllm", "native", "triton", "tiled"),
}
# Families newer than the table: vLLM may run there, so let what is portable prove itself.
UNKNOWN_FAMILY = ("native", "triton", "tiled")

# Of these, candidates whose kernels aren't for that family up to now: nothing that a start need mention, doctor does.
NOT_YET = {120: ("flashinfer_trtllm",)}

# vLLM's --moe-backend names that are backends of this plugin; the rest are vLLM's own kernels.
MOE_BACKENDS = ("flashinfer_trtllm", "triton")


@dataclass(frozen=True)
class Request:
    """What the user asked for. `backend` "auto" takes the first that works; any other must work or is an error.

    `asked_by` names the setting that said so.
    """

    backend: str = "auto"
    asked_by: str = "default"
    prefer_triton: bool = False
    disable_triton: bool = False
    proof: bool = True

    @classmethod
    def from_user(cls, moe_backend: str | None = None, additional_config: Mapping | None = None) -> Request:
        """Gather the environment, vLLM's --moe-backend and the "mxfp4_sm120" entry of --additional-config.

        Raises ValueError for a name that isn't ours, a bad value, or two settings that contradict each other.
        """
        options = _options(additional_config)
        wishes = {
            "--moe-backend": _moe_backend(moe_backend),
            "--additional-config backend": options.get("backend", "auto"),
            envs.BACKEND.name: envs.BACKEND.get(),
            envs.WEIGHTONLY.name: "auto" if envs.WEIGHTONLY.get() else "upcast",
        }
        wishes = {setting: name for setting, name in wishes.items() if name != "auto"}
        if len(set(wishes.values())) > 1:
            said = ", ".join(f"{setting} says {name}" for setting, name in wishes.items())
            raise ValueError(f"contradicting backends: {said}; keep one of them")
        asked_by, backend = next(iter(wishes.items()), ("default", "auto"))
        request = cls(
            backend,
            asked_by,
            prefer_triton=options.get("use_triton", envs.USE_TRITON.get()),
            disable_triton=options.get("disable_triton_moe", envs.DISABLE_TRITON_MOE.get()),
            proof=options.get("proof", envs.PROOF.get()),
        )
        if request.disable_triton and (request.prefer_triton or request.backend == "triton"):
            wish = asked_by if backend == "triton" else envs.USE_TRITON.name
            raise ValueError(f"{wish} asks for triton and {envs.DISABLE_TRITON_MOE.name} forbids it; keep one of them")
        return request


@dataclass(frozen=True)
class Candidate:
    """A backend that was looked at: `reason` is None if it can run here and is right. `tried`: its proof was run."""

    name: str
    reason: str | None = None
    tried: bool = False


@dataclass(frozen=True)
class Choice:
    """The backend that answers, who wanted it, and the candidates that were passed over, in order."""

    backend: type[Backend]
    asked_by: str
    machine: Machine
    rejected: tuple[Candidate, ...] = ()

    def __str__(self) -> str:
        by = "" if self.asked_by == "default" else f", asked for by {self.asked_by}"
        silent = NOT_YET.get(self.machine.family, ())
        told = (candidate for candidate in self.rejected if candidate.tried or candidate.name not in silent)
        passed = "".join(f"; not {candidate.name}: {candidate.reason}" for candidate in told)
        return f"MXFP4 experts on {self.machine.name} ({self.machine.sm}): {self.backend.name}{by}{passed}"


class NoBackend(ValueError):
    """Nothing can run, or the backend that was asked for can't: with every reason."""

    def __init__(self, machine: Machine, request: Request, rejected: tuple[Candidate, ...]) -> None:
        self.rejected = rejected
        reasons = "; ".join(f"{candidate.name}: {candidate.reason}" for candidate in rejected)
        if request.backend != "auto":
            super().__init__(f"{request.asked_by} asks for a backend that can't be used: {reasons}")
        else:
            super().__init__(f"no MXFP4 backend for {machine.name} ({machine.sm}): {reasons}")


@lru_cache
def select(machine: Machine, shape: MoEShape, request: Request = Request(), behind: str | None = None) -> Choice:
    """The backend for layers of `shape` on `machine`, decided once per process.

    With `behind`, of the candidates behind that one. Raises NoBackend, a ValueError.
    """
    names = order(machine, request)
    looked_at: list[Candidate] = []
    for name in names[names.index(behind) + 1 :] if behind else names:
        candidate = look_at(name, machine, shape, request)
        if candidate.reason is None:
            return Choice(load(name), request.asked_by, machine, tuple(looked_at))
        looked_at.append(candidate)
    raise NoBackend(machine, request, tuple(looked_at))


def fall_through(
    choice: Choice, shape: MoEShape, weights: MoEWeights, request: Request = Request(), layer: str = ""
) -> Choice:
    """`choice` if its backend can represent these loaded weights, else the next candidate that can run and does.

    One wait for the device where `choice` stands; then its text says nothing new. Raises NoBackend where nothing takes
    them, ValueError for a scale that is NaN.
    """
    passed = choice.rejected
    prefix = f"{layer}." if layer else ""
    while True:
        try:
            reason = choice.backend.why_not_weights(weights)
        except ValueError as error:
            raise ValueError(f"{prefix}{error}") from None
        if reason is None:
            return replace(choice, rejected=passed)
        passed = (*passed, Candidate(choice.backend.name, f"{prefix}{reason}"))
        try:
            choice = select(choice.machine, shape, request, behind=choice.backend.name)
        except NoBackend as error:
            raise NoBackend(choice.machine, request, (*passed, *error.rejected)) from None
        passed = (*passed, *choice.rejected)


def order(machine: Machine, request: Request = Request()) -> tuple[str, ...]:
    """Names of the candidates to look at, the best first; only one if it was asked for by name."""
    if request.backend != "auto":
        return (request.backend,)
    names = ORDER.get(machine.family, UNKNOWN_FAMILY)
    if request.prefer_triton:
        return ("triton", *(name for name in names if name != "triton"))
    return names


def look_at(name: str, machine: Machine, shape: MoEShape, request: Request = Request()) -> Candidate:
    """Can this backend run that shape here, and has it proved itself? `reason` says why not."""
    if name == "triton" and request.disable_triton:
        return Candidate(name, "switched off (disable_triton_moe)")
    backend = load(name)
    reason = machine.why_unsupported() or backend.why_not(machine, shape)
    if reason is not None or not request.proof:
        return Candidate(name, reason)
    return Candidate(name, proof.why_not(backend, machine, shape), tried=True)


def load(name: str) -> type[Backend]:
    """The backend's class. Backends import what they need late, so this works without CUDA, Triton and FlashInfer."""
    module = import_module(f"vllm_mxfp4_sm120.backends.{MODULES[name]}")
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Backend) and vars(value).get("name") == name
    )


def _moe_backend(name: str | None) -> str:
    if name in (None, "auto", *MOE_BACKENDS):
        return name or "auto"
    raise ValueError(
        f"--moe-backend {name} is not a backend of mxfp4_sm120 (auto, {', '.join(MOE_BACKENDS)}): "
        f"for vLLM's own use --quantization gpt_oss_mxfp4 --moe-backend {name}"
    )


_OPTIONS = {"backend": str, "use_triton": bool, "disable_triton_moe": bool, "proof": bool}


def _options(additional_config: Mapping | None) -> Mapping:
    """The "mxfp4_sm120" entry of --additional-config, checked."""
    options = (additional_config or {}).get("mxfp4_sm120", {})
    if not isinstance(options, Mapping):
        raise ValueError(f"--additional-config mxfp4_sm120 is {options!r}, expected an object of {', '.join(_OPTIONS)}")
    for key, value in options.items():
        if key not in _OPTIONS:
            raise ValueError(f"--additional-config mxfp4_sm120 has {key!r}, expected one of {', '.join(_OPTIONS)}")
        if not isinstance(value, _OPTIONS[key]):
            kind = "true or false" if _OPTIONS[key] is bool else "a backend's name"
            raise ValueError(f"--additional-config mxfp4_sm120 {key} is {value!r}, expected {kind}")
    if options.get("backend", "auto") not in ("auto", *MODULES):
        names = ", ".join(("auto", *MODULES))
        raise ValueError(f"--additional-config mxfp4_sm120 backend is {options['backend']!r}, expected one of {names}")
    return options
