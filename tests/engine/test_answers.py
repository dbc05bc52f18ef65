# SPDX-License-Identifier: Apache-2.0
"""The engine's answers through this plugin, against implementations that are not ours, and proof that it was us."""

from __future__ import annotations

import copy
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.config import CompilationMode

from tests.engine.conftest import MAX_TOKENS, ONE_OF_SEVERAL, Answers, generate, transformers_answers
from vllm_mxfp4_sm120.checkpoint import Sizes
from vllm_mxfp4_sm120.cli.make_tiny import make_tiny
from vllm_mxfp4_sm120.cli.serve import HOST, Server, free_port
from vllm_mxfp4_sm120.memory import upcast_bytes
from vllm_mxfp4_sm120.mxfp4 import BLOCK
from vllm_mxfp4_sm120.selector import Choice

TOLERANCE = 2e-2  # of a log-probability


def assert_ours(answers: Answers, config: dict, choice: Choice, tp: int = 1, ep: int = 1, pp: int = 1) -> None:
    """The engine took our method; every layer of every rank holds it, the right backend, packed weights only."""
    assert answers.quantization == "mxfp4_sm120"
    assert len(answers.layers) == tp * ep * pp
    experts, blocks = config["num_local_experts"] // ep, -(-config["intermediate_size"] // tp // BLOCK)
    shape = replace(Sizes.from_config(config).layer, local_experts=experts, intermediate_size=blocks * BLOCK)
    biases = 2 * (2 * shape.intermediate_size + shape.hidden_size)
    for rank in answers.layers:
        assert len(rank) == config["num_hidden_layers"] // pp
        for method, backend, nbytes in rank.values():
            assert (method, backend) == ("Mxfp4Sm120MoEMethod", choice.backend.name)
            if backend == "tiled":  # others may pad
                assert nbytes == experts * (shape.packed_bytes_per_expert + biases)
            assert nbytes < upcast_bytes(shape) / 2


def test_offline_is_transformers(offline: Answers, expected: Answers, tiny_config: dict, choice: Choice) -> None:
    assert_ours(offline, tiny_config, choice)
    assert offline.worst_difference(expected) < TOLERANCE


def test_http_is_transformers(server: Server, expected: Answers, prompts: list[list[int]], choice: Choice) -> None:
    options = {"logprobs": 0, "return_token_ids": True, "ignore_eos": True}
    choices = [server.complete(ids, MAX_TOKENS, **options)["choices"][0] for ids in prompts]
    answers = Answers(
        [choice["token_ids"] for choice in choices], [choice["logprobs"]["token_logprobs"] for choice in choices]
    )
    assert server.answered_by() == str(choice)
    assert "quantization=mxfp4_sm120" in server.log.read_text()
    assert answers.worst_difference(expected) < TOLERANCE


def test_the_comparison_sees_the_experts(transformers_model, expected: Answers, prompts: list[list[int]]) -> None:
    """Without experts the same model is ten tolerances away: what is compared above does depend on them."""
    without = copy.deepcopy(transformers_model)
    for layer in without.model.layers:
        layer.mlp.experts.down_proj.data.zero_()
        layer.mlp.experts.down_proj_bias.data.zero_()
    forced = [ids + tokens for ids, tokens in zip(prompts, expected.tokens, strict=True)]
    differences = []
    for ids, tokens, logprobs in zip(forced, expected.tokens, expected.logprobs, strict=True):
        with torch.no_grad():
            steps = without(torch.tensor([ids])).logits[0, -MAX_TOKENS - 1 : -1].log_softmax(-1)
        got = steps.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        differences.append((got - torch.tensor(logprobs)).abs().max().item())
    assert min(differences) > 10 * TOLERANCE


# On CPUs vLLM makes room for what a pipeline's second rank receives only as it compiles.
TRACED_ONLY = {"compilation_config": {"mode": CompilationMode.DYNAMO_TRACE_ONCE, "backend": "eager"}}


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two GPUs, or none")
@pytest.mark.parametrize(
    ("ranks", "engine"),
    [
        ({"tp": 2}, {"enforce_eager": True, "tensor_parallel_size": 2}),  # 3 and 2 of the 5 blocks of I
        ({"ep": 2}, {"enforce_eager": True, "tensor_parallel_size": 2, "enable_expert_parallel": True}),
        ({"pp": 2}, {**TRACED_ONLY, "pipeline_parallel_size": 2}),
    ],
    ids=["tensor", "expert", "pipeline"],
)
def test_two_ranks(
    tiny: Path,
    prompts: list[list[int]],
    tmp_path: Path,
    offline: Answers,
    tiny_config: dict,
    choice: Choice,
    ranks: dict[str, int],
    engine: dict[str, Any],
) -> None:
    """A shard of every expert, half of the experts, or half of the layers each."""
    answers = generate(tiny, prompts, tmp_path, quantization="mxfp4_sm120", **engine)
    assert_ours(answers, tiny_config, choice, **ranks)
    assert answers.worst_difference(offline) < TOLERANCE


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


def test_pieces_of_prompts_and_guessed_tokens(
    tiny: Path,
    prompts: list[list[int]],
    tmp_path: Path,
    transformers_model,
    expected: Answers,
    tiny_config: dict,
    choice: Choice,
) -> None:
    """Chunked prefill, prefix caching and speculative decoding in one engine, and each did happen.

    A prompt is followed by its answer, or by that backwards, and by itself: vLLM guesses that what followed it follows
    again, and checks several tokens in one step. It is served in pieces of at most 40 tokens, and then a second time.
    """
    again = [
        ids + tokens[:: 1 if even else -1] + ids
        for ids, tokens, even in zip(prompts, expected.tokens, cycle((True, False)), strict=False)
    ]
    answers = generate(
        tiny,
        again,
        tmp_path,
        rounds=2,
        quantization="mxfp4_sm120",
        enforce_eager=True,
        max_num_batched_tokens=40,
        max_num_seqs=len(prompts),
        block_size=32,
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 3,
        },
        disable_log_stats=False,
    )
    assert max(map(len, again)) > 2 * 40
    assert answers.cached > 0
    guessed, right = (answers.metrics[f"vllm:spec_decode_num_{what}_tokens"] for what in ("draft", "accepted"))
    assert 0 < right < guessed
    assert_ours(answers, tiny_config, choice)
    assert answers.worst_difference(transformers_answers(transformers_model, again)) < TOLERANCE


def test_experts_chosen_by_vllms_router(
    tiny: Path, prompts: list[list[int]], tmp_path: Path, offline: Answers, tiny_config: dict, choice: Choice
) -> None:
    """The other way into the method: vLLM's router hands it the experts that it chose."""
    answers = generate(
        tiny,
        prompts,
        tmp_path,
        quantization="mxfp4_sm120",
        enforce_eager=True,
        vllm_routes=True,
    )
    assert_ours(answers, tiny_config, choice)
    assert answers.worst_difference(offline) < TOLERANCE


def test_vllms_own_bf16(
    tiny: Path, prompts: list[list[int]], tmp_path: Path, offline: Answers, transformers_model
) -> None:
    """vLLM's own BF16 experts, on the checkpoint as transformers dequantized it."""
    bf16 = tmp_path / "bf16"
    bf16.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (bf16 / name).write_bytes((tiny / name).read_bytes())
    config = json.loads((tiny / "config.json").read_text())
    del config["quantization_config"]
    (bf16 / "config.json").write_text(json.dumps(config))
    # Exact: every one of these numbers was BF16 before the model was made float32.
    state = {name: tensor.bfloat16().contiguous() for name, tensor in transformers_model.state_dict().items()}
    save_file(state, bf16 / "model.safetensors", metadata={"format": "pt"})
    answers = generate(bf16, prompts, tmp_path, enforce_eager=True)
    assert answers.quantization is None
    assert answers.worst_difference(offline) < TOLERANCE


@pytest.mark.skipif(
    not (torch.cpu._is_amx_tile_supported() or torch.cuda.is_available()),
    reason="vLLM's own MXFP4 experts need a GPU or a CPU with AMX: without, vLLM refuses to start with them",
)
def test_vllms_own_mxfp4(tiny: Path, prompts: list[list[int]], tmp_path: Path, offline: Answers) -> None:
    answers = generate(tiny, prompts, tmp_path, quantization="mxfp4", enforce_eager=True)
    assert answers.quantization == "gpt_oss_mxfp4"
    assert answers.tokens == offline.tokens


def test_without_the_plugin_it_is_noticed(
    tiny: Path, prompts: list[list[int]], tmp_path: Path, tiny_config: dict, choice: Choice
) -> None:
    """vLLM takes an unknown quantization for its own: where that runs, tokens are right and the proof fails."""
    env = {"VLLM_PLUGINS": "none"}
    try:
        answers = generate(tiny, prompts, tmp_path, env, quantization="mxfp4_sm120", enforce_eager=True)
    except subprocess.CalledProcessError:
        # Not even an answer: vLLM's own method, which took our place, has no kernel for this machine.
        assert "No MXFP4 MoE backend supports the deployment configuration" in (tmp_path / "engine.log").read_text()
        return
    with pytest.raises(AssertionError):
        assert_ours(answers, tiny_config, choice)
    with pytest.raises(AssertionError):
        assert_ours(replace(answers, quantization="mxfp4_sm120"), tiny_config, choice)
