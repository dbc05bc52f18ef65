# SPDX-License-Identifier: Apache-2.0
"""The examples, against stand-ins for what they talk to: an engine, a server."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from tests.docs.pages import ROOT

EXAMPLES = ROOT / "examples"


def test_offline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What it asks for are arguments that vLLM has, under this plugin's name."""
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    engines: list[dict[str, Any]] = []

    class Engine:
        def __init__(self, model: str, **arguments: Any) -> None:
            engines.append({"model": model, **arguments})

        def generate(self, prompts: list[str], sampling: vllm.SamplingParams) -> list[SimpleNamespace]:
            assert sampling.max_tokens == 32
            answers = [SimpleNamespace(text=f"answer {i}") for i in range(len(prompts))]
            return [SimpleNamespace(prompt=p, outputs=[a]) for p, a in zip(prompts, answers, strict=True)]

    monkeypatch.setattr(vllm, "LLM", Engine)
    runpy.run_path(str(EXAMPLES / "offline.py"))["main"]("DIR", "max_model_len=512", "dtype=bfloat16")
    assert engines == [{"model": "DIR", "quantization": "mxfp4_sm120", "max_model_len": 512, "dtype": "bfloat16"}]
    assert set(engines[0]) <= {field.name for field in dataclasses.fields(EngineArgs)}
    assert "'A mixture of experts holds' -> 'answer 0'" in capsys.readouterr().out


CALL = {"id": "1", "type": "function", "function": {"name": "weights_of", "arguments": '{"model": "gpt-oss-20b"}'}}


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An OpenAI-compatible server that calls the tool, then answers; and the requests that it got."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def reply(self, body: dict[str, Any]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def do_GET(self) -> None:
            assert self.path == "/v1/models"
            self.reply({"object": "list", "data": [{"id": "served", "object": "model", "created": 0, "owned_by": "v"}]})

        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            first = len(requests) == 1
            message = {"role": "assistant", "content": None if first else "It would.", "tool_calls": [CALL] * first}
            choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if first else "stop"}
            body = {"id": "1", "object": "chat.completion", "created": 0, "model": "served", "choices": [choice]}
            self.reply(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/v1", requests
        http.shutdown()
        thread.join()


def test_chat_with_tools(server: tuple[str, list[dict[str, Any]]]) -> None:
    from openai import OpenAI
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    url, requests = server
    example = runpy.run_path(str(EXAMPLES / "chat_tools.py"))
    assert example["ask"](OpenAI(base_url=url, api_key="none"), "Would it fit?") == "It would."
    assert len(requests) == 2
    for request in requests:
        ChatCompletionRequest(**request)
    assert [message["role"] for message in requests[1]["messages"]] == ["user", "assistant", "tool"]
    assert requests[1]["messages"][2] == {"role": "tool", "tool_call_id": "1", "content": "12.8 GiB"}
    assert "unknown model 'x'" in example["weights_of"]("x")


def test_dockerfile() -> None:
    """Not built here: its instructions are Docker's, what it copies is there, its variables are declared."""
    text = (EXAMPLES / "docker" / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]
    assert [word for word, _ in lines] == ["ARG", "FROM", "ARG", "COPY", "RUN"]
    declared = {line.partition("=")[0] for word, line in lines if word == "ARG"}
    assert set(re.findall(r"\$\{(\w+)\}", text)) == declared
    assert all((ROOT / word).exists() for word in lines[3][1].split()[:-1])
    assert "MXFP4_SM120_BUILD=1" in lines[4][1]
