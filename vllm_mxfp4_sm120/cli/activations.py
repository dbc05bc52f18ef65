# SPDX-License-Identifier: Apache-2.0
"""What `doctor` says of activations on FP4 tensor cores: which answer, and what was measured of all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vllm_mxfp4_sm120.fp4.plan import BF16, Trial
from vllm_mxfp4_sm120.selector import Choice


@dataclass(frozen=True)
class Activations:
    """Of one model's experts: `answers` in words; `trial` is None where nothing was measured."""

    answers: str
    trial: Trial | None

    @classmethod
    def of(cls, choice: Choice) -> Activations:
        return cls(str(choice.activations), choice.activations.trial)


def table(model: str, trial: Trial) -> Iterator[str]:
    """Microseconds by tokens and kernel, the largest errors below, and why kernels are left out."""
    yield f"microseconds of a layer of {model}, and the largest relative error of a token"
    names = [BF16, *sorted({*trial.errors, *trial.wrong} - {BF16}, reverse=True)]
    widths = {name: max(9, len(name)) for name in names}
    yield "  ".join(["tokens", *(f"{name:>{width}}" for name, width in widths.items())])
    for timed in trial.times:
        cells = [f"{timed.by_kernel[name]:.1f}" if name in timed.by_kernel else "-" for name in names]
        yield "  ".join([f"{timed.tokens:6}", *map(str.rjust, cells, widths.values())])
    errors = [f"{trial.errors[name]:.1e}" if name in trial.errors else "-" for name in names]
    yield "  ".join([" error", *map(str.rjust, errors, widths.values())])
    yield from (f"{name}: {why}" for name, why in trial.wrong.items())
