# SPDX-License-Identifier: Apache-2.0
"""Which backend answers: candidates in order, the first that can run and has proved itself, and why not the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from vllm_mxfp4_sm120 import proof, settings
from vllm_mxfp4_sm120.backends import registry
from vllm_mxfp4_sm120.backends.base import Backend
from vllm_mxfp4_sm120.backends.native import Native
from vllm_mxfp4_sm120.fp4 import plan
from vllm_mxfp4_sm120.fp4.plan import Plan
from vllm_mxfp4_sm120.moe import MoEShape, MoEWeights
from vllm_mxfp4_sm120.platform import Machine

# Why nothing is chosen by the number of tokens.
ONE_FOR_ALL = "VLLM_BATCH_INVARIANT=1 wants the same kernel whatever the number of tokens"


@dataclass(frozen=True)
class Request:
    """What the user asked for. `backend` "auto" takes the first that works; any other must work or is an error.

    `asked_by` names the setting that said so, `activation_by` the one of `activation` (`settings.ACTIVATION`).
    `batch_invariant`: a token's answer must have the same bits whatever other tokens there are.
    """

    backend: str = "auto"
    asked_by: str = "default"
    prefer_triton: bool = False
    disable_triton: bool = False
    proof: bool = True
    activation: str = plan.BF16
    activation_by: str = settings.ACTIVATION.name
    batch_invariant: bool = False

    @property
    def asks_for_terms(self) -> bool:
        """Does the user want FP4 terms, whatever the card says?"""
        return self.activation not in (plan.BF16, plan.OFF)

    @classmethod
    def from_user(
        cls, moe_backend: str | None = None, additional_config: object = None, batch_invariant: bool = False
    ) -> Request:
        """Gather the environment, vLLM's --moe-backend and the "mxfp4_sm120" entry of --additional-config.

        Raises ValueError for a name that isn't ours, a bad value, or two settings that contradict each other.
        """
        options = settings.engine_options(additional_config)
        asked_by, backend = _wanted_backend(moe_backend, options)
        request = cls(
            backend,
            asked_by,
            prefer_triton=settings.USE_TRITON.for_engine(options),
            disable_triton=settings.DISABLE_TRITON_MOE.for_engine(options),
            proof=settings.PROOF.for_engine(options),
            activation=settings.ACTIVATION.for_engine(options),
            activation_by=settings.ACTIVATION.said_by(options),
            batch_invariant=batch_invariant,
        )
        wish = asked_by if backend == "triton" else settings.USE_TRITON.said_by(options)
        if request.disable_triton and (request.prefer_triton or backend == "triton"):
            forbids = settings.DISABLE_TRITON_MOE.said_by(options)
            raise ValueError(f"{wish} asks for triton and {forbids} forbids it; keep one of them")
        if request.prefer_triton and backend not in ("auto", "triton"):
            raise ValueError(f"{wish} asks for triton and {asked_by} for {backend}; keep one of them")
        if request.asks_for_terms and backend not in ("auto", Native.name):
            asked = f"{request.activation_by} asks for {request.activation}"
            raise ValueError(f"{asked}, which only {Native.name} has, and {asked_by} for {backend}; keep one of them")
        return request


def _wanted_backend(moe_backend: str | None, options: Mapping[str, Any]) -> tuple[str, str]:
    """Who asks for a backend by name, and for which: "default" for "auto". Raises ValueError for two of them."""
    weightonly = settings.WEIGHTONLY.given()
    wishes = {
        "--moe-backend": _moe_backend(moe_backend),
        f"{settings.JSON} {settings.BACKEND.key}": options.get(settings.BACKEND.key, "auto"),
        settings.BACKEND.name: settings.BACKEND.get(),
        settings.WEIGHTONLY.name: "upcast" if weightonly is False else "auto",
    }
    wishes = {setting: name for setting, name in wishes.items() if name != "auto"}
    asked_by, backend = next(iter(wishes.items()), ("default", "auto"))
    if backend == "upcast" and weightonly:
        wishes[settings.WEIGHTONLY.name] = "not upcast"
    if len(set(wishes.values())) > 1:
        said = ", ".join(f"{setting} says {name}" for setting, name in wishes.items())
        raise ValueError(f"contradicting backends: {said}; keep one of them")
    return asked_by, backend


@dataclass(frozen=True)
class Candidate:
    """A backend that was looked at: `reason` is None if it can run here and is right. `tried`: its proof was run."""

    name: str
    reason: str | None = None
    tried: bool = False


@dataclass(frozen=True)
class Choice:
    """The backend that answers, who wanted it, and the candidates that were passed over, in order.

    `activations` says what the native backend multiplies at how many tokens; `batch_invariant` is the request's.
    """

    backend: type[Backend]
    asked_by: str
    machine: Machine
    rejected: tuple[Candidate, ...] = ()
    activations: Plan = field(default_factory=Plan)
    batch_invariant: bool = False

    def layer(self, shape: MoEShape) -> Backend:
        """The backend of one layer."""
        layer = self.backend(shape)
        if isinstance(layer, Native):
            layer.fp4_kernels = self.activations.kernels
        return layer

    @property
    def tells_activations(self) -> bool:
        """Is it worth a line what is multiplied: where there are FP4 tensor cores, or kernels that do without?"""
        return self.backend is Native and (self.machine.family == 120 or bool(self.activations.spans))

    def __str__(self) -> str:
        by = "" if self.asked_by == "default" else f", asked for by {self.asked_by}"
        passed = "".join(f"; not {each.name}: {each.reason}" for each in self.rejected if self._worth_saying(each))
        return f"MXFP4 experts on {self.machine.name} ({self.machine.sm}): {self.backend.name}{by}{passed}"

    def _worth_saying(self, passed: Candidate) -> bool:
        return passed.tried or self.machine.family not in registry.find(passed.name).not_yet


class NoBackend(ValueError):
    """Nothing can run, or the backend that was asked for can't: with every reason."""

    def __init__(self, machine: Machine, request: Request, rejected: tuple[Candidate, ...]) -> None:
        self.rejected = rejected
        reasons = "; ".join(f"{candidate.name}: {candidate.reason}" for candidate in rejected)
        if request.backend != "auto":
            super().__init__(f"{request.asked_by} asks for a backend that can't be used: {reasons}")
        else:
            super().__init__(f"no MXFP4 backend for {machine.name} ({machine.sm}): {reasons}")


def this_machine() -> Machine:
    """The machine, with the GPU that this process serves from. Raises ValueError for MXFP4_SM120_BASE_GPU_ID."""
    first = settings.BASE_GPU_ID.get()
    try:
        return Machine.here(first)
    except ValueError as error:
        raise ValueError(f"{settings.BASE_GPU_ID.name}={first}: {error}") from None


@lru_cache
def select(machine: Machine, shape: MoEShape, request: Request = Request(), behind: str | None = None) -> Choice:
    """The backend for layers of `shape` on `machine`, decided once per process.

    With `behind`, of the candidates behind that one. Raises NoBackend, a ValueError, and as `activations_of`.
    """
    names = order(machine, request)
    looked_at: list[Candidate] = []
    for name in names[names.index(behind) + 1 :] if behind else names:
        candidate = look_at(name, machine, shape, request)
        if candidate.reason is None:
            rejected, activations = tuple(looked_at), activations_of(name, machine, shape, request)
            backend, invariant = registry.load(name), request.batch_invariant
            return Choice(backend, request.asked_by, machine, rejected, activations, invariant)
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
    names = registry.automatic(machine.family)
    if request.prefer_triton:
        return ("triton", *(name for name in names if name != "triton"))
    return names


def look_at(name: str, machine: Machine, shape: MoEShape, request: Request = Request()) -> Candidate:
    """Can this backend run that shape here, and has it proved itself? `reason` says why not."""
    if name == "triton" and request.disable_triton:
        return Candidate(name, "switched off (disable_triton_moe)")
    backend = registry.load(name)
    reason = machine.why_unsupported() or backend.why_not(machine, shape)
    if reason is not None or not request.proof:
        return Candidate(name, reason)
    return Candidate(name, proof.why_not(backend, machine, shape), tried=True)


def activations_of(name: str, machine: Machine, shape: MoEShape, request: Request) -> Plan:
    """Where FP4 terms are multiplied. Raises ValueError where the user asks for terms that can't be had."""
    if request.batch_invariant:
        made = Plan(ONE_FOR_ALL)
    elif name == Native.name:
        made = plan.make(machine, shape, request.activation, request.proof)
    else:
        made = Plan(f"{name} answers, and only {Native.name} has FP4 kernels")
    if request.asks_for_terms and made.reason is not None:
        raise ValueError(f"{request.activation_by} asks for {request.activation}, which can't be had: {made.reason}")
    return made


def _moe_backend(name: str | None) -> str:
    if name in (None, "auto", *registry.MOE_BACKENDS):
        return name or "auto"
    raise ValueError(
        f"--moe-backend {name} is not a backend of mxfp4_sm120 (auto, {', '.join(registry.MOE_BACKENDS)}): "
        f"for vLLM's own use --quantization gpt_oss_mxfp4 --moe-backend {name}"
    )
