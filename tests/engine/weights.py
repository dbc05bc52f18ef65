# SPDX-License-Identifier: Apache-2.0
"""An engine whose weights change while it runs: python -m tests.engine.weights MODEL OTHER [JSON of LLM's arguments]

MODEL and OTHER are checkpoints of one shape. Asserts; the last line printed is the answers [[token, logprob]] of OTHER,
put in MODEL's place, one list of them for each kind of `dense`. With MODEL twice these are its own, nothing being
changed. `--sleep` also sends the engine to sleep, which needs a GPU.
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

from tests.engine.neighbours import clean_up
from tests.faults.damage import with_value, without

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


def process_again(model: Any) -> None:
    """As some trainers do after an update, whatever it was. Not vLLM's own linear layers, which CPUs pack, once."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if type(method).__name__ in ("Mxfp4Sm120MoEMethod", "Int8Method"):
            method.process_weights_after_loading(module)


def load(model: Any, weights: list[tuple[str, Any]]) -> None:
    model.load_weights(weights)


class Engine:
    """A running one, and what it answered with the weights that it started with."""

    def __init__(self, model: str, sleeps: bool, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        arguments = {"max_model_len": 512, "quantization": "mxfp4_sm120", "kv_cache_memory_bytes": 1 << 26, **arguments}
        self.llm: Any = LLM(model=model, enable_sleep_mode=sleeps, enable_prefix_caching=False, **arguments)
        self.model, self.answer, self.prints = model, self.answers(), self.fingerprints()

    def answers(self) -> list:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
        prompts = [{"prompt_token_ids": list(range(5, 5 + length))} for length in (1, 7, 40)]
        outputs = [request.outputs[0] for request in self.llm.generate(prompts, sampling, use_tqdm=False)]
        return [
            [(token, step[token].logprob) for token, step in zip(output.token_ids, output.logprobs, strict=True)]
            for output in outputs
        ]

    def fingerprints(self) -> list[dict[str, list]]:
        """Of each rank."""
        from tests.engine.weights import fingerprint  # which ranks in other processes find by this name

        return self.llm.apply_model(fingerprint)

    def expect_the_first(self, what: str) -> None:
        assert self.fingerprints() == self.prints, f"{what}: other bytes or places"
        assert self.answers() == self.answer, f"{what}: other answers"
        print(f"{what}: as before", flush=True)

    def reload(self, path: str | None = None, **how: Any) -> None:
        """As vLLM does: from a folder, or `weights_iterator`."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": path, **how} if path else how)

    def update(self, weights: list[tuple[str, Any]]) -> None:
        """As a trainer does that calls load_weights itself."""
        from tests.engine.weights import load

        self.llm.apply_model(partial(load, weights=weights))


def changes(engine: Engine, other: str) -> list:
    """Weights that change, and back. Returns the answers of OTHER."""
    from tests.engine.weights import load_experts, process_again

    engine.reload()
    engine.expect_the_first("the same, reloaded")
    engine.reload(other)
    second, others = engine.answers(), engine.fingerprints()
    assert second != engine.answer
    for rank, before in zip(others, engine.prints, strict=True):
        assert {name: place for name, (place, _) in rank.items()} == {n: place for n, (place, _) in before.items()}
        same = {name for name, (_, digest) in rank.items() if digest == before[name][1]}
        # The identity in every tiny checkpoint, and the bias that only the first rank adds.
        assert all(name.endswith(("router.weight", "packed_w2_bias")) for name in same), same
    engine.reload(engine.model)
    engine.expect_the_first("another and back")
    engine.llm.apply_model(process_again)
    engine.expect_the_first("processed again")

    engine.llm.apply_model(partial(load_experts, path=other, only="gate_up_proj"))
    engine.expect_the_first("a part of each layer")
    engine.llm.apply_model(partial(load_experts, path=other, only="down_proj"))
    for rank, before, after in zip(engine.fingerprints(), engine.prints, others, strict=True):
        assert all(value == (after if ".packed_" in name else before)[name] for name, value in rank.items())
    assert engine.answers() != engine.answer
    engine.llm.apply_model(partial(load_experts, path=engine.model))
    engine.expect_the_first("experts a tensor at a time")
    engine.llm.apply_model(partial(load_experts, path=other, only="gate_up_proj"))
    engine.reload(engine.model)
    engine.expect_the_first("left unfinished, and reloaded")
    return second


def refusals(engine: Engine, other: str) -> None:
    """What is wrong is refused by name, and the old weights answer.

    On one rank: where several raise, vLLM takes the others' errors for answers to its next calls.
    """
    import torch
    from safetensors.torch import load_file

    new = load_file(Path(other) / SHARD)
    attention, packed = "model.layers.0.self_attn", "model.layers.0.mlp.experts"
    q, k, v, o = (f"{attention}.{letter}_proj.weight" for letter in "qkvo")
    scales = f"{packed}.down_proj_scales"
    others = [name for name in new if name.startswith(packed) and name != scales]
    nan, cut = (o, torch.full_like(new[o], float("nan"))), (scales, new[scales][:, :100])
    all_nan = (scales, torch.full_like(new[scales], 255))

    def those(*names: str) -> list[tuple[str, Any]]:
        return [(name, new[name]) for name in names]

    def session(weights: list[tuple[str, Any]]) -> None:
        engine.reload(weights_iterator=weights)

    for change, weights, said in (
        (engine.update, [*those("lm_head.weight"), cut], "down_proj_scales is U8 [16, 100, 5], expected U8"),
        (engine.update, [*those("lm_head.weight"), nan], f"NaN or Inf (or beyond BF16's range) in {o}"),
        (engine.update, [*those(*others), all_nan], f"{scales}[0, 0, 0] is 255 (NaN)"),
        (session, [*those("lm_head.weight"), nan], f"NaN or Inf (or beyond BF16's range) in {o}"),
        (session, [*those(*others), all_nan], f"{scales}[0, 0, 0] is 255 (NaN)"),
        (session, those(q), f"{k}, {v} missing, expected q, k and v together"),
        (session, those(*others), f"{scales} not loaded"),
    ):
        refuse(said, partial(change, weights))
        engine.expect_the_first(f"refused: {said}")
    session(those(q, k, v, "lm_head.weight", f"{attention}.o_proj.bias", "model.layers.1.mlp.router.bias"))
    assert engine.answers() != engine.answer
    engine.reload(engine.model)
    engine.expect_the_first("some tensors, and back")
    with TemporaryDirectory() as folder:
        for what, damage, said in (
            ("missing", without(k), f"{k} (BF16"),
            ("nan", with_value("model.layers.1.mlp.router.bias", float("nan")), "model.layers.1.mlp.router.bias"),
        ):
            copy = Path(shutil.copytree(other, Path(folder, what)))
            damage(copy)
            refuse(said, partial(engine.reload, str(copy)))
            if what == "missing":
                engine.expect_the_first("a folder without a tensor")
        empty = Path(folder, "saved")
        empty.mkdir()
        refuse("can't be saved", partial(engine.llm.collective_rpc, "save_sharded_state", kwargs={"path": str(empty)}))
        assert not any(empty.iterdir())
    engine.answers()  # of new layers and, from the NaN on, old ones
    engine.reload(engine.model)
    engine.expect_the_first("after what was refused")


def refuse(said: str, change: Callable[[], Any]) -> None:
    try:
        change()
    except Exception as error:  # of the engine's process, whatever it is there
        assert said in str(error), error
    else:
        raise AssertionError(f"taken: {said}")


def main() -> None:
    model, other, *rest = sys.argv[1:]
    sleeps = "--sleep" in rest
    arguments = json.loads(next((text for text in rest if text.startswith("{")), "{}"))
    one_rank = arguments.get("tensor_parallel_size", 1) == 1
    found = []
    for kind in ("off", "int8") if one_rank else ("off",):
        engine = Engine(model, sleeps, {**arguments, "additional_config": {"mxfp4_sm120": {"dense": kind}}})
        found.append(engine.answer if model == other else changed(engine, other, one_rank, sleeps))
        del engine
        clean_up()
    print(json.dumps(found))


def changed(engine: Engine, other: str, one_rank: bool, sleeps: bool) -> list:
    """All that can be done to one engine. Returns the answers of OTHER."""
    second = changes(engine, other)
    if one_rank:
        refusals(engine, other)
    for level in (1, 2) if sleeps else ():
        engine.llm.sleep(level=level)
        engine.llm.wake_up(tags=["weights"])
        if level == 2:
            engine.reload()
        engine.llm.wake_up(tags=["kv_cache"])
        engine.expect_the_first(f"asleep at level {level}")
    return second


if __name__ == "__main__":
    main()
