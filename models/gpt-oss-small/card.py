# SPDX-License-Identifier: Apache-2.0
"""Writes what the card measures, the part of README.md from "## Measured" on: perplexity, and what the model says.

PYTHONPATH=.:benchmarks python models/gpt-oss-small/card.py
"""

from __future__ import annotations

import platform
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from quality import compare, targets, versions, windows_of
from quality_logits import Setting, load_transformers, record_engine, record_transformers, start_engine

HERE = Path(__file__).parent
CARD, CHECKPOINT = HERE / "README.md", str(HERE / "checkpoint")
HEADING = "## Measured\n"
TOKENS = 48
PROMPTS = (
    "It is a truth universally acknowledged, that",
    "Elizabeth was not in the least surprised",
    "The captain looked at the whale",
    "In the beginning",
    "Her father was a man of",
    "The king said to his servants,",
    "They walked along the river in silence,",
    '"I am very much obliged to you," said',
    "The ship sailed from Nantucket",
    "After dinner the ladies",
)
SAMPLINGS = {
    "Greedy": {"temperature": 0.0},
    "Sampled, temperature 0.8, seed 0": {"temperature": 0.8, "seed": 0},
}


def perplexities(engine: Any) -> Iterator[str]:
    """A table of perplexities, and of how far each is from the first."""
    windows = windows_of(CHECKPOINT, (HERE / "heldout.txt").read_text())
    judged = targets(windows)
    yield f"Held-out text, {len(judged):,} tokens judged in {len(windows)} windows of {len(windows[0])}:\n"
    yield "| computed by | perplexity | KL from the first, mean (nats) | equal greedy tokens |\n|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        first, file = Path(folder) / "first", Path(folder) / "other"
        exact = record_transformers(load_transformers(CHECKPOINT, "float32"), windows, first).open(first)
        for name in ("float32", "bfloat16", "packed"):
            if name == "packed":
                recorded = record_engine(engine, windows, file)
            else:
                recorded = record_transformers(load_transformers(CHECKPOINT, name), windows, file)
            found = compare(exact, recorded.open(file), judged)
            source = recorded.source.replace("Mxfp4Sm120MoEMethod:", "this plugin, packed, ")
            yield f"| {source} | {found.perplexity_b:.3f} | {found.kl_mean:.1e} | {found.equal_greedy:.2%} |"


def completions(engine: Any) -> Iterator[str]:
    from vllm import SamplingParams

    for title, options in SAMPLINGS.items():
        yield f"\n### {title}\n"
        for prompt in PROMPTS:
            (request,) = engine.generate([prompt], SamplingParams(max_tokens=TOKENS, **options), use_tqdm=False)
            said = re.sub(r"\s+", " ", request.outputs[0].text).rstrip()
            yield f"- **{prompt}**{said}"


def main() -> None:
    engine = start_engine(CHECKPOINT, 1024, Setting.parse(["skip_tokenizer_init=false"]).arguments)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"a CPU ({platform.machine()})"
    with_versions = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [f"By `card.py`, on {where}, with {with_versions}.\n", *perplexities(engine), *completions(engine)]
    written = CARD.read_text().partition(HEADING)[0] + HEADING
    CARD.write_text(written + "\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
