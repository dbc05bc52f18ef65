# SPDX-License-Identifier: Apache-2.0
"""GPT-OSS in this process, without a server.

    python examples/offline.py [MODEL] [OPTION=VALUE ...]

MODEL is a name on the hub or a checkpoint's directory; options are keyword arguments of vllm.LLM, for instance
max_model_len=32768 or tensor_parallel_size=2.
"""

import json
import sys
from typing import Any

from vllm import LLM, SamplingParams

PROMPTS = ["A mixture of experts holds", "The four bits of an FP4 number are"]


def value(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def main(model: str = "openai/gpt-oss-20b", *options: str) -> None:
    engine: dict[str, Any] = {"max_model_len": 8192}
    for option in options:
        name, _, text = option.partition("=")
        engine[name] = value(text)
    llm = LLM(model, quantization="mxfp4_sm120", **engine)
    for request in llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=32)):
        print(f"{request.prompt!r} -> {request.outputs[0].text!r}")


if __name__ == "__main__":  # vLLM starts processes, which import this file again
    main(*sys.argv[1:])
