# SPDX-License-Identifier: Apache-2.0
"""configs/serve: vLLM's own parser takes each file, and what it asks for fits its card."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from vllm_mxfp4_sm120.checkpoint import published_config
from vllm_mxfp4_sm120.fit import CARDS, DRIVER, GIB, SYSTEM, UTILIZATION, Card, Memory

DIRECTORY = Path(__file__).parents[2] / "configs" / "serve"
FILES = sorted(file for file in DIRECTORY.glob("*.yaml"))
PUBLISHED = [file for file in FILES if re.match(r"gpt-oss-(20|120)b-", file.name)]
CARD = {card.name.lower().replace(" ", "-"): card for card in CARDS}
# CPUs: the machine's memory that the file names, of which vLLM and Python take their part.
CPU = {"gpt-oss-20b-cpu.yaml": 32 * GIB, "gpt-oss-120b-cpu.yaml": 96 * GIB}


def card_of(file: Path) -> tuple[str, int]:
    """The card that a file's name ends with, and how many."""
    match = re.fullmatch(r"gpt-oss-\d+b-(2x-)?(.*)\.yaml", file.name)
    assert match
    return match[2], 2 if match[1] else 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_vllm_takes_it(file: Path) -> None:
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    settings = yaml.safe_load(file.read_text())
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(["serve", *([] if "model" in settings else ["a/model"]), "--config", str(file)])
    engine = AsyncEngineArgs.from_cli_args(args)
    for name, value in settings.items():
        expected = json.loads(value) if name == "additional-config" else value
        assert getattr(engine, name.replace("-", "_")) == expected, name


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_it_fits(file: Path) -> None:
    """And as many requests as it says do."""
    text = file.read_text()
    settings = yaml.safe_load(text)
    memory, (name, ranks) = Memory(published_config(settings["model"])), card_of(file)
    assert settings["quantization"] == "mxfp4_sm120"
    assert settings.get("tensor-parallel-size", 1) == ranks
    card = CARD.get(name, CARDS[0])
    batched = settings.get("max-num-batched-tokens", card.batched_tokens)
    working = memory.working(batched, settings.get("max-num-seqs", 256), ranks, card.fp4)
    one = memory.cache_of_request(settings["max-model-len"], batched, tensor_parallel=ranks)
    weights = memory.weights(tensor_parallel=ranks)
    if "int8" in settings.get("additional-config", ""):
        weights -= memory.dense(ranks) - memory.dense_int8(ranks)
    if name == "cpu":
        cache = settings["kv-cache-memory-bytes"]
        assert cache >= one and weights + working + cache < 0.85 * CPU[file.name]
        return
    left = taken(card, settings.get("gpu-memory-utilization", UTILIZATION)) - weights - working
    assert one < left
    said = re.search(r"holds (\d+) requests? of (\d+) tokens at once(?:, or (\d+) of (\d+))?", text)
    assert said is not None
    for count, tokens in (said.group(1, 2), said.group(3, 4)):
        if count is not None:
            each = memory.cache_of_request(int(tokens), batched, tensor_parallel=ranks)
            assert int(count) == left // each, (count, left / each)


def taken(card: Card, utilization: float) -> float:
    """Bytes of one card that vLLM takes."""
    if card.shared:
        assert card.memory * 1e9 * (1 - utilization) > SYSTEM
        return card.memory * 1e9 * utilization
    return card.memory * GIB * DRIVER * utilization


def test_every_card_has_its_file_or_does_not_fit() -> None:
    for model in ("20b", "120b"):
        memory = Memory(published_config(f"openai/gpt-oss-{model}"))
        for name, ranks in (
            ("rtx-5080", 1),
            ("rtx-5090", 1),
            ("rtx-5090", 2),
            ("rtx-pro-6000", 1),
            ("gb10", 1),
            ("h100", 1),
        ):
            there = (DIRECTORY / f"gpt-oss-{model}-{'2x-' if ranks == 2 else ''}{name}.yaml").exists()
            assert there == (memory.fit(CARD[name], ranks, "BF16", 2, 8192).requests > 0), (model, name, ranks)


def test_comments_say_what_was_not_run() -> None:
    for file in PUBLISHED:
        assert re.search(r"^# (Not run|Served on)", file.read_text(), re.MULTILINE), file.name
