# SPDX-License-Identifier: Apache-2.0
"""Every deliberate fault in reading and writing checkpoints is caught, by the test that the table names."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.mutations.checkpoint import MUTATIONS, ROOT


def test_every_fault_is_caught() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.mutations.checkpoint"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    failed = json.loads(run.stdout.splitlines()[-1])
    assert failed == {"no fault": False, **{mutation.name: True for mutation in MUTATIONS}}
