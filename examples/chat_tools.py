# SPDX-License-Identifier: Apache-2.0
"""A chat in which the model may call a tool, with a server started as examples/README.md says.

python examples/chat_tools.py [--url http://127.0.0.1:8000/v1] [--question TEXT]
"""

import argparse
import json
from typing import Any

from openai import OpenAI

WEIGHTS = {"gpt-oss-20b": 12.8, "gpt-oss-120b": 60.8}  # GiB in MXFP4

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weights_of",
            "description": "Size of a model's weights in GiB",
            "parameters": {
                "type": "object",
                "properties": {"model": {"type": "string", "enum": list(WEIGHTS)}},
                "required": ["model"],
            },
        },
    }
]


def weights_of(model: str) -> str:
    return f"{WEIGHTS[model]} GiB" if model in WEIGHTS else f"unknown model {model!r}, expected one of {list(WEIGHTS)}"


def ask(client: OpenAI, question: str, turns: int = 4) -> str | None:
    """The model's answer. Each turn the model either answers, or calls the tool and is told what it says."""
    model = client.models.list().data[0].id
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    for _ in range(turns):
        completion = client.chat.completions.create(model=model, messages=messages, tools=TOOLS, temperature=0)
        message = completion.choices[0].message
        if not message.tool_calls:
            return message.content
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            said = weights_of(**json.loads(call.function.arguments))
            print(f"{call.function.name}({call.function.arguments}) -> {said}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": said})
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="the server's")
    parser.add_argument("--question", default="Would the weights of gpt-oss-20b fit a card of 16 GiB?")
    given = parser.parse_args()
    print(ask(OpenAI(base_url=given.url, api_key="none"), given.question))


if __name__ == "__main__":
    main()
