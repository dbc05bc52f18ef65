# SPDX-License-Identifier: Apache-2.0
"""The logits of every position of some windows of text, computed by a vLLM engine or by transformers, into a file.

A program of its own, so that every setting has a process, and a GPU, to itself: `python quality_logits.py OUT`, with
JSON {"setting": [words], "model": path, "windows": [[token id]]} on stdin. OUT gets the logits as they were computed,
[windows * (window - 1), vocabulary] without a header, and OUT.json what they are (`Logits`).
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from formats import named
from torch import Tensor, nn

TRANSFORMERS = "transformers"


@dataclass(frozen=True)
class Setting:
    """How a model is computed: by transformers or by a vLLM engine, and with which arguments of either."""

    by_transformers: bool
    arguments: dict[str, Any]

    @classmethod
    def parse(cls, words: Sequence[str]) -> Setting:
        """From the words of a command line. Raises ValueError for one that isn't NAME=VALUE."""
        by_transformers = TRANSFORMERS in words
        arguments: dict[str, Any] = {}
        for word in words:
            name, equals, value = word.partition("=")
            if word == TRANSFORMERS:
                continue
            if not name.isidentifier() or not equals:
                raise ValueError(f"{word!r} is not a setting: expected transformers, or NAME=VALUE as in backend=tiled")
            arguments[name] = _value(value)
        if by_transformers:
            return cls(
                True, {"dtype": "bfloat16", "device": "cuda" if torch.cuda.is_available() else "cpu"} | arguments
            )
        engine = {"quantization": "mxfp4_sm120", "enforce_eager": True} | arguments
        if (backend := engine.pop("backend", None)) is not None:
            engine["additional_config"] = {"mxfp4_sm120": {"backend": backend}}
        return cls(False, engine)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@dataclass(frozen=True)
class Logits:
    """What a file of logits holds: [rows, vocabulary] of `dtype`; `source` says who computed them.

    `own_perplexity` is what the engine itself says: of the log-probabilities that it answers with.
    """

    rows: int
    vocabulary: int
    dtype: str
    source: str
    own_perplexity: float | None = None

    def open(self, path: Path) -> Tensor:
        """The file as a tensor, which is read from disk as it is used."""
        size = self.rows * self.vocabulary
        flat = torch.from_file(str(path), shared=False, size=size, dtype=getattr(torch, self.dtype))
        return flat.view(self.rows, self.vocabulary)


class Recorder:
    """Appends logits to a file as they come."""

    def __init__(self, path: Path) -> None:
        self.file: BinaryIO = path.open("wb")
        self.rows, self.vocabulary, self.dtype = 0, 0, ""
        self.expected = 0  # rows of the prompt that is being computed

    def add(self, logits: Tensor) -> None:
        """logits [rows, vocabulary] of any dtype, always the same."""
        for block in logits.split(128):  # a copy of 50 MB for GPT-OSS's vocabulary
            block.contiguous().cpu().view(torch.uint8).numpy().tofile(self.file)
        self.file.flush()
        self.rows += len(logits)
        self.vocabulary, self.dtype = logits.shape[1], str(logits.dtype).removeprefix("torch.")

    def close(self, source: str) -> Logits:
        self.file.close()
        return Logits(self.rows, self.vocabulary, self.dtype, source)


def start_engine(model: str, window: int, arguments: dict[str, Any]) -> Any:
    """A vLLM engine that computes a whole window in one step, and one window at a time."""
    ranks = [arguments.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline", "data")]
    if max(ranks) == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # The functions below go to the engine's processes by name.
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    from vllm import LLM

    length = window + 1  # one token is generated
    room = {"max_model_len": length, "max_num_batched_tokens": length, "max_num_seqs": 1}
    room |= {"enable_prefix_caching": False, "skip_tokenizer_init": True}
    if not torch.cuda.is_available():
        room["kv_cache_memory_bytes"] = 1 << 28  # else vLLM takes half of the machine's memory
    return LLM(model=model, **room | arguments)


def record_engine(llm: Any, windows: Sequence[Sequence[int]], path: Path) -> Logits:
    """The logits with which the engine itself answers a request for its prompt's log-probabilities.

    Raises RuntimeError if the engine didn't compute a row for each position but a window's last.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False, prompt_logprobs=0)
    llm.apply_model(partial(start_recording, path=str(path)))
    said: list[float] = []
    try:
        for window in windows:
            llm.apply_model(partial(expect, rows=len(window) - 1))
            (request,) = llm.generate([{"prompt_token_ids": list(window)}], sampling, use_tqdm=False)
            steps = zip(request.prompt_logprobs[1:], window[1:], strict=True)
            said += [step[token].logprob for step, token in steps]
    finally:
        recorded = [Logits(**found) for found in llm.apply_model(stop_recording) if found is not None]
    expected = sum(len(window) - 1 for window in windows)
    if [logits.rows for logits in recorded] != [expected]:
        raise RuntimeError(f"the engine gave {[logits.rows for logits in recorded]} rows of logits, not [{expected}]")
    return replace(recorded[0], own_perplexity=math.exp(-sum(said) / len(said)))


def start_recording(model: nn.Module, path: str) -> None:
    """In each of the engine's processes. Which of them has logits, and writes them, is the first of the last stage."""
    from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

    if get_tensor_model_parallel_rank() or not get_pp_group().is_last_rank:
        return
    recorder, compute = Recorder(Path(path)), model.compute_logits

    def compute_and_record(hidden_states: Tensor) -> Tensor:
        logits = compute(hidden_states)
        # A single row is that of the token to be generated. A prompt's come together, in one piece or in several, and
        # vLLM's second model runner computes its last row again.
        if len(logits) > 1 and (rows := min(len(logits), recorder.expected)):
            recorder.add(logits[:rows])
            recorder.expected -= rows
        return logits

    model.recorder, model.compute_logits = recorder, compute_and_record


def expect(model: nn.Module, rows: int) -> None:
    """So many rows are the next prompt's."""
    if (recorder := vars(model).get("recorder")) is not None:
        recorder.expected = rows


def stop_recording(model: nn.Module) -> dict[str, Any] | None:
    recorder = vars(model).pop("recorder", None)
    if recorder is None:
        return None
    del model.compute_logits
    return asdict(recorder.close(who_computes(model)))


def who_computes(model: nn.Module) -> str:
    """The methods, and this plugin's backends, that the engine's MoE layers hold."""
    methods = [module.quant_method for name, module in model.named_modules() if name.endswith("routed_experts")]
    names = {f"{type(m).__name__}:{m.backend.name}" if hasattr(m, "backend") else type(m).__name__ for m in methods}
    return f"vLLM, {', '.join(sorted(names))}"


@torch.inference_mode()
def record_transformers(model: Any, windows: Sequence[Sequence[int]], path: Path) -> Logits:
    """The logits of transformers' model of a checkpoint, as `load_transformers` gives it."""
    recorder = Recorder(path)
    for window in windows:
        recorder.add(model(torch.tensor([window], device=model.device), use_cache=False).logits[0, :-1])
    return recorder.close(f"transformers, {model.dtype}".replace("torch.", ""))


def load_transformers(
    model: str, dtype: str = "bfloat16", device: str = "cpu", experts: str | None = None, **arguments: Any
) -> Any:
    """transformers' own GPT-OSS, its experts dequantized by transformers, in eval mode.

    `experts` rounds what enters their products to a number format: a word that `formats.named` takes.
    """
    formats = named(experts) if experts else None
    from transformers import AutoConfig, GptOssForCausalLM, Mxfp4Config

    packed = getattr(AutoConfig.from_pretrained(model), "quantization_config", None)
    how = {"quantization_config": Mxfp4Config(dequantize=True)} if packed else {}
    how |= {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.bfloat16} | arguments
    # transformers dequantizes to BF16 whatever dtype is asked for. That is exact: no value has over 2 significant bits.
    loaded = GptOssForCausalLM.from_pretrained(model, **how)
    if formats:
        for layer in loaded.model.layers:
            replace_inputs(layer.mlp.experts, lambda product, x: formats[product](x))
    return loaded.to(device=device, dtype=getattr(torch, dtype)).eval()


def replace_inputs(experts: nn.Module, change: Callable[[str, Tensor], Tensor]) -> None:
    """The two products of transformers' experts get what `change("gate_up" or "down", x)` makes of their inputs."""
    apply_gate = experts._apply_gate
    experts.register_forward_pre_hook(lambda module, given: (change("gate_up", given[0]), *given[1:]))
    experts._apply_gate = lambda gate_up: change("down", apply_gate(gate_up))


def main() -> None:
    # By name, for the engine's processes can't find __main__'s functions.
    from quality_logits import record_engine, record_transformers, start_engine

    task, path = json.load(sys.stdin), Path(sys.argv[1])
    setting, windows = Setting.parse(task["setting"]), task["windows"]
    if setting.by_transformers:
        logits = record_transformers(load_transformers(task["model"], **setting.arguments), windows, path)
    else:
        engine = start_engine(task["model"], max(map(len, windows)), setting.arguments)
        logits = record_engine(engine, windows, path)
    path.with_suffix(".json").write_text(json.dumps(asdict(logits)))


if __name__ == "__main__":
    main()
