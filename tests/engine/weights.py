# SPDX-License-Identifier: Apache-2.0
"""An engine whose weights change while it runs: python -m tests.engine.weights MODEL OTHER [JSON of LLM's arguments]

MODEL and OTHER are checkpoints of one shape. Asserts; the last line printed is the answers [[token, logprob]] of OTHER,
put in MODEL's place. With MODEL twice these are its own, nothing being changed. `--sleep` also sends the engine to
sleep, which needs a GPU.
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

SHARD = "model-00001-of-00001.safetensors"


def fingerprint(model: Any) -> dict[str, list]:
    """Where each parameter lies, and a digest of its bytes; for experts as the backend holds them."""
    import torch

    def digest(tensor: torch.Tensor) -> str:
        return hashlib.sha256(tensor.numpy()).hexdigest()

    return {
        name: [
            parameter.data_ptr(),
            hashlib.sha256(parameter.data.cpu().contiguous().view(torch.uint8).numpy()).hexdigest(),
        ]
        for name, parameter in model.named_parameters()
        if parameter.numel() and (".routed_experts." not in name or ".packed_" in name)
    }


def load_experts(model: Any, path: str, only: str = "") -> None:
    """As a trainer does that calls load_weights itself, a tensor at a time."""
    from safetensors.torch import load_file

    for name, tensor in sorted(load_file(Path(path) / SHARD).items()):
        if ".experts." in name and only in name:
            model.load_weights([(name, tensor)])


def load_damaged(model: Any, path: str) -> str:
    """What is said of experts of another shape; nothing of them is left behind."""
    from safetensors.torch import load_file

    name = "model.layers.0.mlp.experts.down_proj_scales"
    try:
        model.load_weights([(name, load_file(Path(path) / SHARD)[name][:, :100])])
    except ValueError as error:
        return str(error)
    return "taken"


def main() -> None:
    from vllm import LLM, SamplingParams

    from tests.engine.weights import fingerprint, load_damaged, load_experts

    model, other, *rest = sys.argv[1:]
    sleeps = "--sleep" in rest
    arguments = json.loads(next((text for text in rest if text.startswith("{")), "{}"))
    arguments = {"max_model_len": 512, "quantization": "mxfp4_sm120", "kv_cache_memory_bytes": 1 << 26, **arguments}
    llm = LLM(model=model, enable_sleep_mode=sleeps, enable_prefix_caching=False, **arguments)
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
    prompts = [{"prompt_token_ids": list(range(5, 5 + length))} for length in (1, 7, 40)]

    def answers() -> list:
        outputs = [request.outputs[0] for request in llm.generate(prompts, sampling, use_tqdm=False)]
        return [
            [(token, step[token].logprob) for token, step in zip(output.token_ids, output.logprobs, strict=True)]
            for output in outputs
        ]

    def expect(what: str, answer: list, experts: list) -> None:
        assert llm.apply_model(fingerprint) == experts, f"{what}: other bytes or places"
        assert answers() == answer, f"{what}: other answers"
        print(f"{what}: as before", flush=True)

    first, experts = answers(), llm.apply_model(fingerprint)
    if model == other:
        print(json.dumps(first))
        return
    llm.collective_rpc("reload_weights")
    expect("the same, reloaded", first, experts)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": other})
    second, others = answers(), llm.apply_model(fingerprint)
    assert second != first
    for rank, before in zip(others, experts, strict=True):
        assert {name: place for name, (place, _) in rank.items()} == {n: place for n, (place, _) in before.items()}
        same = {name for name, (_, digest) in rank.items() if digest == before[name][1]}
        # The identity in every tiny checkpoint, and the bias that only the first rank adds.
        assert all(name.endswith(("router.weight", "packed_w2_bias")) for name in same), same
    llm.collective_rpc("reload_weights", kwargs={"weights_path": model})
    expect("another and back", first, experts)

    llm.apply_model(partial(load_experts, path=other, only="gate_up_proj"))
    expect("a part of each layer", first, experts)
    llm.apply_model(partial(load_experts, path=other, only="down_proj"))
    for rank, before, after in zip(llm.apply_model(fingerprint), experts, others, strict=True):
        assert all(value == (after if ".packed_" in name else before)[name] for name, value in rank.items())
    assert answers() != first
    llm.apply_model(partial(load_experts, path=model))
    expect("experts a tensor at a time", first, experts)
    said = llm.apply_model(partial(load_damaged, path=other))
    assert all("down_proj_scales is U8" in line for line in said), said
    llm.collective_rpc("reload_weights")
    expect("after what was refused", first, experts)
    for level in (1, 2) if sleeps else ():
        llm.sleep(level=level)
        llm.wake_up(tags=["weights"])
        if level == 2:
            llm.collective_rpc("reload_weights")
        llm.wake_up(tags=["kv_cache"])
        expect(f"asleep at level {level}", first, experts)
    print(json.dumps(second))


if __name__ == "__main__":
    main()
