# SPDX-License-Identifier: Apache-2.0
"""Experts that two ranks hold as 8 and 7: in one engine, and in two that share them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.engine.conftest import ONE_OF_SEVERAL, TOLERANCE, Answers, generate
from vllm_mxfp4_sm120.cli.make_tiny import make_tiny
from vllm_mxfp4_sm120.cli.server import HOST, free_port


@pytest.fixture(scope="module")
def odd(tiny_config: dict, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answers]:
    """15 experts, which two ranks hold as 8 and 7; and the answers of one rank."""
    directory = tmp_path_factory.mktemp("odd")
    make_tiny(directory / "model", {**tiny_config, "num_local_experts": 15})
    return directory / "model", generate(
        directory / "model", prompts, directory, quantization="mxfp4_sm120", enforce_eager=True
    )


def assert_8_and_7(two: Answers, one: Answers) -> None:
    sizes = [[nbytes for _, _, nbytes in rank.values()] for rank in (*one.layers, *two.layers)]
    assert [rank[0] * 15 for rank in sizes] == [sizes[0][0] * experts for experts in (15, 8, 7)]
    assert two.worst_difference(one) < TOLERANCE


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two GPUs, or none")
def test_experts_that_the_ranks_do_not_divide(
    odd: tuple[Path, Answers], prompts: list[list[int]], tmp_path: Path
) -> None:
    engine = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    two = generate(odd[0], prompts, tmp_path, quantization="mxfp4_sm120", enforce_eager=True, **engine)
    assert_8_and_7(two, odd[1])


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two GPUs, or none")
def test_data_and_expert_parallel(odd: tuple[Path, Answers], prompts: list[list[int]], tmp_path: Path) -> None:
    """Two engines with 8 and 7 of the experts; one has 5 prompts, the other 3."""
    port = free_port()

    def answer(rank: int) -> Answers:
        env = {"VLLM_DP_SIZE": "2", "VLLM_DP_RANK": f"{rank}", "VLLM_DP_RANK_LOCAL": f"{rank}"}
        env |= {"VLLM_DP_MASTER_IP": HOST, "VLLM_DP_MASTER_PORT": f"{port}", **ONE_OF_SEVERAL}
        directory = tmp_path / f"{rank}"
        directory.mkdir()
        mine = prompts[:5] if rank == 0 else prompts[5:]
        engine = {"quantization": "mxfp4_sm120", "enforce_eager": True, "enable_expert_parallel": True}
        return generate(odd[0], mine, directory, env, **engine)

    with ThreadPoolExecutor() as ranks:
        one, other = ranks.map(answer, range(2))
    assert one.quantization == other.quantization == "mxfp4_sm120"
    both = replace(
        one,
        tokens=one.tokens + other.tokens,
        logprobs=one.logprobs + other.logprobs,
        layers=[*one.layers, *other.layers],
    )
    assert_8_and_7(both, odd[1])
