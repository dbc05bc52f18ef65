# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine in a process of its own: a JSON task as argv[2], a JSON result into the file named by argv[1].

Run as a module, from the repository's root.

Task: {"engine": LLM's keyword arguments, "prompts": [[token id]],
"adapters": [a LoRA's folder or null, for each prompt] or null, "max_tokens": n, "rounds": n, "vllm_routes": bool,
"score": bool}.
Result: {"quantization": ..., "layers": [{layer: [method, backend, bytes]} per rank], "tokens": [[id]],
"logprobs": [[x]], "scores": [[log-probability of each prompt token but the first]],
"cached": prompt tokens that were not computed again,
"metrics": {vLLM's name: its counter}};
the tokens and what follows them are those of the last round.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def who_answers(model) -> dict[str, list]:
    """For each MoE layer: its method's class, its backend's name, and the bytes of its parameters."""
    return {
        name: [
            type(module.quant_method).__qualname__,
            getattr(getattr(module.quant_method, "backend", None), "name", None),
            sum(parameter.nbytes for parameter in module.parameters()),
        ]
        for name, module in model.named_modules()
        if name.endswith("routed_experts")
    }


def let_vllm_route(model) -> None:
    """From now on vLLM's router chooses the experts, as it does when the engine was asked to return its choice."""
    for name, module in model.named_modules():
        if name.endswith("routed_experts"):
            module.quant_method.routes = False


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    # Ranks in other processes find a function by its module, which for them is not __main__.
    from tests.engine.generate import let_vllm_route, who_answers

    task = json.loads(sys.argv[2])
    llm = LLM(**task["engine"])
    if task["vllm_routes"]:
        llm.apply_model(let_vllm_route)
    sampling = SamplingParams(temperature=0.0, max_tokens=task["max_tokens"], ignore_eos=True, logprobs=0)
    sampling.prompt_logprobs = 0 if task["score"] else None
    prompts = [{"prompt_token_ids": ids} for ids in task["prompts"]]
    adapters = task["adapters"] and [folder and LoRARequest(folder, 1, folder) for folder in task["adapters"]]
    for _ in range(task["rounds"]):
        requests = llm.generate(prompts, sampling, use_tqdm=False, lora_request=adapters)
    outputs = [request.outputs[0] for request in requests]
    counted = task["engine"].get("disable_log_stats", True) is False
    result = {
        "quantization": llm.llm_engine.model_config.quantization,
        "layers": llm.apply_model(who_answers),
        "tokens": [list(output.token_ids) for output in outputs],
        "logprobs": [
            [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
            for output in outputs
        ],
        "scores": [
            [step[token].logprob for step, token in zip(r.prompt_logprobs[1:], r.prompt_token_ids[1:], strict=True)]
            for r in requests
            if task["score"]
        ],
        "cached": sum(request.num_cached_tokens or 0 for request in requests),
        "metrics": {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")} if counted else {},
    }
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
