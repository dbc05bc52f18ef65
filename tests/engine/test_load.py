# SPDX-License-Identifier: Apache-2.0
"""An engine that is killed, as benchmarks/load.py has it. test_http.py has its load; by hand it's run whole."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import psutil

from benchmarks import load
from vllm_mxfp4_sm120.cli.server import check_port


def test_a_killed_engine_leaves_nothing_and_a_restart_serves(tiny: Path, tmp_path: Path) -> None:
    task = load.Task((5, 6, 7), 8)
    with ExitStack() as stack:
        server = load.start(stack, str(tiny), tmp_path)
        answer, before = load.ask(server, task), load.family(server)
        assert "answer" not in load.kill_engine(server, load.Task((5,) * 100, 400))
    assert not psutil.wait_procs(before, 10)[1]
    check_port("127.0.0.1", server.port)
    with ExitStack() as stack:
        assert load.ask(load.start(stack, str(tiny), tmp_path, server.port), task).tokens == answer.tokens
