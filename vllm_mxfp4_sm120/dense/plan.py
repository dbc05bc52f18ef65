# SPDX-License-Identifier: Apache-2.0
"""Which linear answers at how many tokens: the card decides, for each layer's shape, once for all processes.

A kernel of ours serves after it has solved each shape in the proof's process, and only at the sizes at which it was
faster there than what would answer instead: torch's linear, of INT8 weights behind their decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

from vllm_mxfp4_sm120 import proof, settings
from vllm_mxfp4_sm120.backends.native import library
from vllm_mxfp4_sm120.checkpoint import AttentionSizes, Sizes
from vllm_mxfp4_sm120.dense import native
from vllm_mxfp4_sm120.dense.int8 import BLOCK
from vllm_mxfp4_sm120.dense.linear import TORCHS_OWN, LinearShape, serve
from vllm_mxfp4_sm120.platform import Machine

TRIAL = "vllm_mxfp4_sm120.dense.trial:solve"  # imported in the proof's process only


@dataclass(frozen=True)
class Timing:
    """At so many tokens: our fastest kernel's name, its microseconds, and those of what would answer instead."""

    tokens: int
    name: str
    ours: float
    torchs: float


@dataclass(frozen=True)
class Plan:
    """What was measured of each shape; `reason` is why nothing was, or why no kernel of ours answers."""

    reason: str | None = None
    timings: Mapping[LinearShape, Sequence[Timing]] = field(default_factory=dict)

    def name_at(self, shape: LinearShape, tokens: int) -> str | None:
        """The kernel that answers, None where it is torch's linear; between two measured sizes as at the larger."""
        for timing in self.timings.get(shape, ()):
            if timing.tokens >= tokens:
                return timing.name if timing.ours <= proof.MARGIN * timing.torchs else None
        return None

    def serve(self) -> None:
        """Hand it to the operator of this process."""
        numbers = {config.name: number for number, config in enumerate(native.configurations())} if self.timings else {}
        for shape, timings in self.timings.items():
            if not timings:  # no kernel takes it, and none that decodes was proved for it
                continue
            names = (self.name_at(shape, tokens) for tokens in range(1 + max(timing.tokens for timing in timings)))
            serve(shape, [TORCHS_OWN if name is None else numbers.get(name, TORCHS_OWN) for name in names])

    def text(self, shape: LinearShape) -> str:
        """One line on a shape: which kernel at which numbers of tokens, and by how much it is faster there."""
        if self.reason is not None:
            return f"torch's linear: {self.reason}"
        if not self.timings.get(shape):
            return f"torch's linear: no kernel takes {shape.columns} columns"
        parts = [
            f"{name} at {first} to {last.tokens} tokens ({last.ours:.1f} us there, torch {last.torchs:.1f})"
            for first, last, name in self._runs(shape)
        ]
        return f"{', '.join(parts)}; else torch's linear" if parts else "torch's linear, which was faster at every size"

    def _runs(self, shape: LinearShape) -> Iterator[tuple[int, Timing, str]]:
        """(first number of tokens, last timing, kernel) of neighbouring sizes at which the same kernel answers."""
        run: tuple[int, Timing, str] | None = None
        smallest = 1
        for timing in self.timings.get(shape, ()):
            name = self.name_at(shape, timing.tokens)
            if run is not None and run[2] != name:
                yield run
                run = None
            if name is not None:
                run = (smallest if run is None else run[0], timing, name)
            smallest = timing.tokens + 1
        if run is not None:
            yield run


def shapes(config: Mapping[str, Any], tensor_parallel: int, int8: bool) -> dict[str, LinearShape]:
    """The linear layers that read most bytes, as one rank of vLLM's has them. Raises ValueError as `Sizes` does.

    INT8 where their rows are whole blocks. The router isn't among them: it is small, and its error would choose other
    experts.
    """
    sizes, attention = Sizes.from_config(config), AttentionSizes.from_config(config)
    heads, kv_heads = attention.heads_of_rank(tensor_parallel)
    dim, hidden = attention.head_dim, sizes.hidden_size
    return {
        "qkv_proj": LinearShape((heads + 2 * kv_heads) * dim, hidden, int8),
        "o_proj": LinearShape(hidden, heads * dim, int8 and heads * dim % BLOCK == 0),
        "lm_head": LinearShape(attention.padded_vocab_size // tensor_parallel, hidden, int8, bias=False),
    }


def why_not(machine: Machine) -> str | None:
    """One line saying why no kernel of ours can run here; None if they can."""
    if machine.capability is None:
        return "it needs an NVIDIA GPU"
    return machine.why_unsupported() or library.why_not(machine)


def make(layers: Mapping[str, LinearShape], machine: Machine, prove: bool = True) -> Plan:
    """Ask the card, or the record of an earlier answer. `prove` False: nothing is tried, so nothing is known."""
    wanted = sorted(set(layers.values()))
    if (reason := why_not(machine)) is not None:
        return Plan(reason)
    if not prove:
        return Plan(f"without a proof nothing is timed ({settings.PROOF.name})")
    answer = proof.ask("dense", TRIAL, machine, {"shapes": [list(astuple(shape)) for shape in wanted]})
    if answer.reason is not None:
        return Plan(answer.reason)
    try:
        return Plan(None, {shape: [Timing(*row) for row in answer.found[str(shape)]] for shape in wanted})
    except (KeyError, TypeError):
        return Plan("its record can't be read; `mxfp4-sm120 doctor --forget` tries again")
