# SPDX-License-Identifier: Apache-2.0
"""Every deliberate fault in the Triton kernels is caught by the conformance suite."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.mutations.triton import MUTATIONS


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_every_fault_is_caught() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.mutations.triton"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == {"no fault": False, **{fault.name: True for fault in MUTATIONS}}
