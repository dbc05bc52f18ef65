# SPDX-License-Identifier: Apache-2.0
"""Weights that change in a running engine: the new ones answer, from where the old ones lay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.engine.conftest import EAGER, ENV, ONE_OF_SEVERAL, ONE_PROCESS
from tests.support import warm
from vllm_mxfp4_sm120.cli.make_tiny import make_tiny


def run(log: Path, model: Path, other: Path, ranks: int = 1) -> list[list[list[list[float]]]]:
    """What tests/engine/weights.py prints last: answers, for `dense` off and on one rank int8."""
    env = EAGER | (ONE_OF_SEVERAL if ranks > 1 else ONE_PROCESS)
    arguments = json.dumps({"enforce_eager": True, "tensor_parallel_size": ranks})
    warm.run("tests.engine.weights", model, other, arguments, environment={**ENV, **env}, log=log)
    return json.loads(next(line for line in reversed(log.read_text().splitlines()) if line.startswith("[[[[")))


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two GPUs, or none")
def test_reloaded_updated_and_back(tiny: Path, tiny_config: dict, tmp_path: Path) -> None:
    """On one rank and on two, of which the second has a short shard: what is loaded anew answers as a fresh engine."""
    other = tmp_path / "other"
    make_tiny(other, tiny_config, seed=1)
    log = tmp_path / "log"
    fresh = run(log, other, other)
    assert run(log, tiny, other) == fresh
    assert len(fresh) == 2 and fresh[0] != fresh[1]
    one_rank, (two_ranks,) = fresh[0], run(log, tiny, other, ranks=2)
    assert [[token for token, _ in answer] for answer in two_ranks] == [[token for token, _ in a] for a in one_rank]
    assert (torch.tensor(two_ranks) - torch.tensor(one_rank)).abs().max() < 2e-2
