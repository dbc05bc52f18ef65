# SPDX-License-Identifier: Apache-2.0
"""One engine with the small model, judged in every way that the tests ask for.

    TRITON_INTERPRET=1 PYTHONPATH=.:benchmarks python -m tests.quality.judge [FILE]

Its experts are computed by each backend that a CPU has, and by the plain one with each of the faults: the engine is
started once, and its layers are given another backend each time. FILE gets, as JSON, {"backends": {name: figures},
"faults": {name: figures}, "completion": what follows the prompt of `mxfp4-sm120 serve`, "own_perplexity": as the engine
answers, "long_answers": {prompt: {judge: [lead of a token that differs]}}}. Without it the table of faults is written.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quality import SMALL, compare, targets, windows_of
from quality_logits import Setting, load_transformers, record_engine, record_transformers, start_engine
from torch import Tensor

from tests.quality import long_answers
from tests.quality.faults import FAULTS, NO_FAULT, break_model, write
from vllm_mxfp4_sm120 import moe
from vllm_mxfp4_sm120.backends.tiled import Tiled
from vllm_mxfp4_sm120.cli.serve import PROMPT
from vllm_mxfp4_sm120.moe import MoEWeights

CHECKPOINT = str(SMALL / "checkpoint")
TOKENS = 2 * 1024
LONG_PROMPTS, LONG = long_answers.PROMPTS[:3], 256
INTERPRETED = 128  # tokens of the text's start: Triton's interpreter needs ten seconds for them
BACKENDS = ("tiled", "upcast", "reference")


class Reference(Tiled):
    """What defines every backend's answer, in float32 on the way and BF16 at the end."""

    def forward(
        self, prepared: Any, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        answer = moe.reference(MoEWeights(**prepared), x, topk_ids, topk_weights, expert_map=expert_map)
        return answer.to(x.dtype)


def change_backend(model: Any, name: str) -> None:
    """Give every MoE layer of a running engine that backend, prepared anew from the checkpoint."""
    from vllm_mxfp4_sm120.backends import registry
    from vllm_mxfp4_sm120.checkpoint import Checkpoint

    folder = Checkpoint(CHECKPOINT)
    for index, layer in enumerate(model.model.layers):
        method = layer.mlp.experts.routed_experts.quant_method
        method.backend = (Reference if name == "reference" else registry.load(name))(method.shape)
        method.prepared = method.backend.prepare(folder.read_layer(index))


def figures(expected: dict[str, Tensor], logits: Tensor, judged: Tensor) -> dict[str, float]:
    """Perplexity beside that of transformers in BF16, and everything else against transformers in float32,

    whose own rounding hides nothing.
    """
    rounded, exact = (compare(expected[dtype], logits, judged) for dtype in ("bfloat16", "float32"))
    return asdict(exact) | {"perplexity_a": rounded.perplexity_a}


def main() -> None:
    from vllm import SamplingParams

    windows = windows_of(CHECKPOINT, (SMALL / "heldout.txt").read_text(), tokens=TOKENS)
    judged = targets(windows)
    with tempfile.TemporaryDirectory() as folder:
        models = {dtype: load_transformers(CHECKPOINT, dtype) for dtype in ("bfloat16", "float32")}
        expected = {}
        for dtype, model in models.items():
            file = Path(folder) / dtype
            expected[dtype] = record_transformers(model, windows, file).open(file)
        engine = Setting.parse(["skip_tokenizer_init=false"]).arguments
        llm = start_engine(CHECKPOINT, max(map(len, windows)), engine)
        file = Path(folder) / "engine"

        def judge() -> dict[str, float]:
            return figures(expected, record_engine(llm, windows, file).open(file), judged)

        found: dict[str, Any] = {"backends": {"auto": judge()}, "faults": {}}
        found["own_perplexity"] = record_engine(llm, windows, file).own_perplexity
        sampling = SamplingParams(temperature=0.0, max_tokens=32)
        found["completion"] = llm.generate([PROMPT], sampling, use_tqdm=False)[0].outputs[0].text
        answers = long_answers.judge(llm, models, LONG_PROMPTS, LONG)
        found["long_answers"] = {
            prompt: {name: [each.behind for each in differences] for name, differences in judges.items()}
            for prompt, judges in answers.items()
        }
        for name in BACKENDS:
            llm.apply_model(partial(change_backend, name=name))
            found["backends"][name] = judge()
        if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
            llm.apply_model(partial(change_backend, name="triton"))
            start = {dtype: logits[: INTERPRETED - 1] for dtype, logits in expected.items()}
            interpreted = record_engine(llm, [windows[0][:INTERPRETED]], file).open(file)
            found["backends"]["triton"] = figures(start, interpreted, judged[: INTERPRETED - 1])
        for name in (NO_FAULT, *(fault.name for fault in FAULTS)):
            llm.apply_model(partial(break_model, name=name, checkpoint=CHECKPOINT))
            found["faults"][name] = judge()
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(found) + "\n")
    else:
        write(found["faults"])


if __name__ == "__main__":
    main()
