# SPDX-License-Identifier: Apache-2.0
"""Every deliberate fault in a backend is caught, by what the table says, and the table is in README.md."""

from __future__ import annotations

import pytest

from tests.conformance.suite import TOLERANCE, Subject, draw
from tests.mutations.backends import MUTATIONS, PROOF, SUITE, faulty_tiled
from tests.mutations.table import README, Mutation, render
from vllm_mxfp4_sm120 import proof
from vllm_mxfp4_sm120.backends.base import Backend
from vllm_mxfp4_sm120.moe import MoEShape

# With every expert here, and with every other one.
SHAPES = (MoEShape(20, 20, 96, 160, 4), MoEShape(40, 20, 96, 160, 4))
CASES = 400


pytestmark = pytest.mark.usefixtures("one_thread")


def what_the_proof_says(backend: type[Backend]) -> str | None:
    return next(filter(None, (proof.solve(backend, shape, "cpu").reason for shape in SHAPES)), None)


def what_the_suite_says(backend: type[Backend]) -> str | None:
    subject = Subject("faulty", backend, TOLERANCE["tiled"])
    return next(filter(None, map(subject.complaint, draw(0, CASES))), None)


SAYS = {PROOF: what_the_proof_says, SUITE: what_the_suite_says}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_fault_is_caught(mutation: Mutation) -> None:
    backend = faulty_tiled(mutation)
    assert SAYS[mutation.caught_by](backend) is not None
    assert what_the_suite_says(backend) is not None


def test_no_fault_is_no_fault() -> None:
    """Built the same way, of unchanged source."""
    backend = faulty_tiled(None)
    assert what_the_proof_says(backend) is None and what_the_suite_says(backend) is None


def test_the_table_is_in_the_readme() -> None:
    assert README.read_text() == render(), "run: python -m tests.mutations.table"
