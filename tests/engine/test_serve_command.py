# SPDX-License-Identifier: Apache-2.0
"""`mxfp4-sm120 serve` as it is typed, with the real vLLM: it answers, and whatever ends it leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.conftest import ENV
from tests.support.processes import processes, wait_until
from vllm_mxfp4_sm120.cli.server import check_port, free_port

# After it: of the user's own name and key, a completion is answered only if the command follows them.
PASSED_ON = "--enforce-eager --max-model-len 512 --kv-cache-memory-bytes 67108864 --served-model-name x --api-key k"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_serve(number: int, tiny: Path, tmp_path: Path) -> None:
    port, mark = free_port(), f"{os.getpid()}-{number}"
    command = [sys.executable, "-m", "vllm_mxfp4_sm120.cli", "serve", str(tiny), "--port", f"{port}", "--"]
    command += PASSED_ON.split()
    env = {**ENV, "MARK_OF_SERVE": mark, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith("serving"):
                break
        assert "completion:" in said and "answered by: MXFP4 experts on" in said, said
        assert "--api-key ***" in said
        assert list(tmp_path.glob("mxfp4-sm120-*/server.log"))
        second = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert second.returncode == 1 and f"{port}" in second.stderr.splitlines()[-1], second.stderr
        process.send_signal(number)
        assert process.wait(120) == 128 + number
        wait_until(lambda: not processes(f"MARK_OF_SERVE={mark}"))
        check_port("127.0.0.1", port)
        assert not list(tmp_path.glob("mxfp4-sm120-*"))
    finally:
        process.kill()
        process.communicate()
