# SPDX-License-Identifier: Apache-2.0
"""The engine's answers through this plugin, against implementations that are not ours, and proof that it was us."""

from __future__ import annotations

import copy
import json
import subprocess
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.engine.conftest import MAX_TOKENS, TOLERANCE, Answers, assert_ours, generate, transformers_answers
from vllm_mxfp4_sm120.selector import Choice


def test_offline_is_transformers(offline: Answers, expected: Answers, tiny_config: dict, choice: Choice) -> None:
    assert_ours(offline, tiny_config, choice)
    assert offline.worst_difference(expected) < TOLERANCE


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


def test_pieces_of_prompts_and_guessed_tokens(
    tiny: Path,
    prompts: list[list[int]],
    tmp_path: Path,
    transformers_model,
    expected: Answers,
    tiny_config: dict,
    choice: Choice,
) -> None:
    """Chunked prefill, prefix caching, speculative decoding and dense kernels in one engine, and each did happen.

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
        {"FAKE_DENSE": "1"},
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
        additional_config={"mxfp4_sm120": {"dense": "bf16"}},
    )
    assert "fake_dense: " in (tmp_path / "engine.log").read_text()
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
