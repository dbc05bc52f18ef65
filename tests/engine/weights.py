# SPDX-License-Identifier: Apache-2.0
"""An engine whose weights change while it runs: python -m tests.engine.weights MODEL OTHER [JSON of LLM's arguments]

MODEL and OTHER are checkpoints of one shape. Asserts; the last line printed is the answers [[token, logprob]] of OTHER,
put in MODEL's place. With MODEL twice these are its own, nothing being changed. `--sleep` also sends the engine to
sleep, which needs a GPU.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.faults.damage import Damage, with_value, without

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


def load(model: Any, weights: list[tuple[str, Any]]) -> None:
    model.load_weights(weights)


def damaged(folder: Path, original: str, damage: Damage) -> str:
    """A copy of the checkpoint, damaged."""
    damage(Path(shutil.copytree(original, folder)))
    return str(folder)


def main() -> None:
    import torch
    from safetensors.torch import load_file
    from vllm import LLM, SamplingParams

    from tests.engine.weights import fingerprint, load, load_experts

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
    new = load_file(Path(other) / SHARD)
    attention, packed = "model.layers.0.self_attn", "model.layers.0.mlp.experts"
    nan = new[f"{attention}.o_proj.weight"].clone().fill_(float("nan"))
    scales = new[f"{packed}.down_proj_scales"]

    def those(*names: str) -> list[tuple[str, Any]]:
        return [(name, new[name]) for name in names]

    def refuse(what: str, said: str, change: Callable[[], Any], *, untouched: bool = True) -> None:
        try:
            change()
        except Exception as error:  # of the engine's process, whatever it is there
            assert said in str(error), f"{what}: {error}"
        else:
            raise AssertionError(f"{what}: taken")
        if untouched:
            expect(f"refused: {what}", first, experts)

    def update(weights: list[tuple[str, Any]]) -> Callable[[], Any]:
        return lambda: llm.apply_model(partial(load, weights=weights))

    def session(weights: list[tuple[str, Any]]) -> Callable[[], Any]:
        return lambda: llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})

    qkv = [f"{attention}.{letter}_proj.weight" for letter in "qkv"]
    wrong = (f"{packed}.down_proj_scales", scales[:, :100])
    refuse("another shape", "down_proj_scales is U8", update([*those(f"{packed}.down_proj_blocks"), wrong]))
    refuse(
        "NaN behind a good one", "NaN or Inf", update([*those("lm_head.weight"), (f"{attention}.o_proj.weight", nan)])
    )
    refuse("NaN in a session", "NaN or Inf", session([*those("lm_head.weight"), (f"{attention}.o_proj.weight", nan)]))
    named = [name for name in new if name.startswith(packed) and not name.endswith("down_proj_scales")]
    refuse(
        "a scale that is NaN",
        f"{packed}.down_proj_scales[0, 0, 0] is 255",
        update([*those(*named), (f"{packed}.down_proj_scales", torch.full_like(scales, 255))]),
    )
    refuse("q without k and v", f"{attention}.k_proj.weight, {attention}.v_proj.weight missing", session(those(qkv[0])))
    refuse("experts without scales", f"{packed}.down_proj_scales not loaded", session(those(*named)))
    session(those(*qkv, "lm_head.weight", f"{attention}.o_proj.bias", "model.layers.1.mlp.router.bias"))()
    assert answers() not in (first, second)
    with TemporaryDirectory() as folder:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": model})
        expect("some tensors, and back", first, experts)
        for what, damage, said, untouched in (
            ("a folder without k_proj", without(qkv[1]), f"{qkv[1]} (BF16", True),
            ("NaN in a folder", with_value("model.layers.1.mlp.router.bias", float("nan")), "router.bias", False),
        ):
            copy = damaged(Path(folder, what), other, damage)
            refuse(
                what,
                said,
                lambda copy=copy: llm.collective_rpc("reload_weights", kwargs={"weights_path": copy}),  # type: ignore[misc]
                untouched=untouched,
            )
        empty = Path(folder, "saved")
        empty.mkdir()
        refuse(
            "saving",
            "can't be saved",
            lambda: llm.collective_rpc("save_sharded_state", kwargs={"path": str(empty)}),
            untouched=False,
        )
        assert not any(empty.iterdir())
    answers()  # of old layers and new ones
    llm.collective_rpc("reload_weights", kwargs={"weights_path": model})
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
