# SPDX-License-Identifier: Apache-2.0
"""The conformance suite on a GPU: `pytest tests/gpu/test_conformance.py --conformance-cases 6000 --conformance-seed 1`.

Replay a failure there with `--replay FILE --conformance-device cuda`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.conformance.cases import Case
from tests.conformance.suite import Subject, draw, first_failure
from vllm_mxfp4_sm120.moe import MoEShape
from vllm_mxfp4_sm120.platform import Machine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

# A backend's part of --conformance-cases, and of how many different layers. Triton compiles each layer's kernels anew,
# for three sizes of tiles: about ten seconds.
SHARE = {"native": (0.7, None), "triton": (0.18, 4), "tiled": (0.1, None), "upcast": (0.02, None)}
# Every backend at the sizes that users have: all the paths that depend on them.
GPT_OSS = Case(0, hidden_blocks=90, intermediate_blocks=90, experts=4, top_k=4, tokens=64)


@pytest.fixture(params=SHARE)
def subject(request: pytest.FixtureRequest) -> Subject:
    subject = Subject.named(request.param, "cuda")
    machine = Machine.here()
    reason = machine.why_unsupported() or subject.backend.why_not(machine, MoEShape(4, 4, 64, 64, 2))
    if reason is not None:
        pytest.skip(f"{subject.name}: {reason}")
    return subject


@pytest.mark.usefixtures("one_thread")
def test_random_cases(subject: Subject, request: pytest.FixtureRequest) -> None:
    seed = request.config.getoption("--conformance-seed")
    share, shapes = SHARE[subject.name]
    count = max(1, round(request.config.getoption("--conformance-cases") * share))
    print(f"{subject.name}: {count} cases from seed {seed}")
    if (failure := first_failure(subject, draw(seed, count, shapes))) is not None:
        pytest.fail(failure.report(), pytrace=False)


@pytest.mark.parametrize("tokens", [1, 8, 300])
@pytest.mark.parametrize("blocks", [90, 23])
def test_gpt_oss_sizes(subject: Subject, tokens: int, blocks: int) -> None:
    """Whole experts and a tensor parallel shard of them, with columns far from their neighbours."""
    case = replace(GPT_OSS, intermediate_blocks=blocks, tokens=tokens)
    oddities = [{"scales": "rows", "bias": "large"}, {"x": "outlier columns", "path": "logits"}]
    if (failure := first_failure(subject, [replace(case, seed=tokens, **odd) for odd in oddities])) is not None:
        pytest.fail(failure.report(), pytrace=False)
