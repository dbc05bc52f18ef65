# SPDX-License-Identifier: Apache-2.0
"""/v1/chat/completions as docs/chat.md has it, without a network: the prompt is harmony's, the model's answer is this
plugin's, and reasoning, tools and text are taken out of what a GPT-OSS would say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI
from openai_harmony import HarmonyEncodingName, load_harmony_encoding

from tests.engine.conftest import ENV
from vllm_mxfp4_sm120.cli.make_tiny import make_tiny
from vllm_mxfp4_sm120.cli.serve import Server

# Of the published models: harmony's ids go up to 201087.
VOCABULARY = {"vocab_size": 201088, "bos_token_id": 199998, "eos_token_id": 200002, "pad_token_id": 199999}
ARGUMENTS = """--quantization mxfp4_sm120 --enforce-eager --max-model-len 512 --kv-cache-memory-bytes 67108864
    --max-num-seqs 4 --tool-call-parser openai --enable-auto-tool-choice --reasoning-parser openai_gptoss
    --served-model-name gpt-oss --logits-processors tests.engine.scripted:Scripted"""
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SAYS = (
    "<|channel|>analysis<|message|>They want the weather.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Sunny.<|return|>"
)
CALLS = (
    "<|channel|>analysis<|message|>I must ask.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
    '<|constrain|>json<|message|>{"city": "Paris"}<|call|>'
)


@pytest.fixture(scope="module")
def server(tiny_config: dict, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("chat")
    make_tiny(folder / "model", {**tiny_config, **VOCABULARY})
    env = {**ENV, "PYTHONPATH": f"{Path(__file__).parents[2]}:{ENV.get('PYTHONPATH', '')}"}
    with Server(str(folder / "model"), ARGUMENTS.split(), folder / "server.log", env=env) as running:
        running.wait_until_healthy(600)
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none")


def tokens(text: str) -> list[int]:
    encoding = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
    return encoding.encode(text, allowed_special="all")


def ask(client: OpenAI, script: str, **options):
    scripted = {"vllm_xargs": {"script": tokens(script)}}
    return client.chat.completions.create(
        model="gpt-oss", messages=QUESTION, temperature=0, max_tokens=64, extra_body=scripted, **options
    )


def test_reasoning_and_answer_come_apart(client: OpenAI, server: Server) -> None:
    answer = ask(client, SAYS)
    message = answer.choices[0].message
    assert (message.content, message.reasoning) == ("Sunny.", "They want the weather.")
    assert answer.choices[0].finish_reason == "stop" and not message.tool_calls
    assert answer.usage.completion_tokens == len(tokens(SAYS))
    assert server.answered_by() is not None


def test_a_tool_is_called(client: OpenAI) -> None:
    choice = ask(client, CALLS, tools=[WEATHER]).choices[0]
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    assert (choice.finish_reason, choice.message.reasoning) == ("tool_calls", "I must ask.")


def test_a_stream_says_the_same(client: OpenAI) -> None:
    deltas = [chunk.choices[0].delta for chunk in ask(client, SAYS, stream=True) if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "Sunny."
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == "They want the weather."


def test_the_prompt_is_harmonys_and_the_answer_the_models(client: OpenAI, server: Server) -> None:
    """Nothing scripted: what chat sends to the model, sent by /v1/completions, gives the same tokens."""
    options = {"temperature": 0, "max_tokens": 8, "extra_body": {"return_token_ids": True}}
    raw = client.chat.completions.with_raw_response.create(model="gpt-oss", messages=QUESTION, **options)
    chat = json.loads(raw.content)
    prompt = chat["prompt_token_ids"]
    text = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS).decode(prompt)
    assert text.startswith("<|start|>system<|message|>You are ChatGPT")
    assert text.endswith("<|start|>user<|message|>What is the weather in Paris?<|end|><|start|>assistant")
    plain = server.complete(prompt, 8, return_token_ids=True)["choices"][0]
    assert chat["choices"][0]["token_ids"] == plain["token_ids"]
