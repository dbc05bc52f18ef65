# SPDX-License-Identifier: Apache-2.0
"""`mxfp4-sm120 inspect PATH_OR_REPO`: what a checkpoint holds, what is wrong with it, what it takes, where it fits."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vllm_mxfp4_sm120 import mxfp4
from vllm_mxfp4_sm120.checkpoint import Sizes, published_config
from vllm_mxfp4_sm120.checkpoint.survey import Survey, survey
from vllm_mxfp4_sm120.cli.ending import Outcome, WrongArguments
from vllm_mxfp4_sm120.cli.progress import progress
from vllm_mxfp4_sm120.fit import GIB, LAYOUTS, MIB, Fit, Memory

PUBLISHED = ("openai/gpt-oss-20b", "openai/gpt-oss-120b")
EXAMPLES = """examples:
  mxfp4-sm120 inspect ./gpt-oss-20b
  mxfp4-sm120 inspect openai/gpt-oss-120b --json
  mxfp4-sm120 inspect ./my-finetune-mxfp4 --verify

No weight is read, but by --verify. A repository's headers come from Hugging Face's cache, or by HTTP.
The table's numbers: requests of that length that the KV cache holds at once, "-" where not even one fits.
"""


@dataclass(frozen=True)
class LayoutReport:
    """A backend's: sizes after padding, and the bytes of all weights."""

    name: str
    hidden_size: int
    intermediate_size: int
    experts: int
    weights: int


@dataclass
class Report:
    """Everything that `inspect` prints. Bytes; `dense_int8` is what `dense: int8` makes of `dense_bf16`."""

    source: str
    layout: str
    problems: list[str]
    sizes: Sizes
    block_size: int = mxfp4.BLOCK
    layouts: list[LayoutReport] = field(default_factory=list)
    rest: dict[str, int] = field(default_factory=dict)
    dense_bf16: int = 0
    dense_int8: int = 0
    fits: list[Fit] = field(default_factory=list)


def examine(seen: Survey) -> Report:
    """Raises ValueError for a config.json whose sizes make no sense."""
    memory = Memory(seen.config, f"{seen.source}/config.json")
    report = Report(
        seen.source, seen.layout, unpacked_problems(seen) if seen.layout == "bf16" else seen.problems(), memory.sizes
    )
    for layout in LAYOUTS:
        padded = layout.sizes(memory.sizes.hidden_size, memory.sizes.intermediate_size)
        report.layouts.append(LayoutReport(layout.name, *padded, memory.experts(layout), memory.weights(layout)))
    report.rest = {"attention, norms, routers": memory.attention_and_router(), **memory.vocabulary()}
    report.dense_bf16, report.dense_int8 = memory.dense(), memory.dense_int8()
    report.fits = list(memory.fits())
    return report


def unpacked_problems(seen: Survey) -> list[str]:
    """What keeps `pack` from taking a checkpoint of floats, one line each."""
    from vllm_mxfp4_sm120.packing.source import Source, Unfit

    try:
        Source(seen.source, config=seen.config, headers=seen.headers)
    except Unfit as error:
        return seen.faults + error.problems
    except ValueError as error:
        return [*seen.faults, str(error)]
    return seen.faults


def lines(report: Report) -> Iterator[str]:
    """The report for people."""
    sizes = report.sizes
    layers = f"{sizes.num_layers} layer{'s' if sizes.num_layers > 1 else ''}"
    yield f"{report.source}: {layers}, {sizes.num_experts} experts, {sizes.top_k} a token"
    what = {
        "mxfp4": f"experts in MXFP4, {report.block_size} values a scale",
        "bf16": "experts aren't packed: `mxfp4-sm120 pack` packs them",
        "none": "no experts among its tensors",
        "unknown": "no headers here: what follows is config.json's",
    }[report.layout]
    yield f"hidden size {sizes.hidden_size}, intermediate size {sizes.intermediate_size}, {what}"
    yield ""
    unit, size = ("GiB", GIB) if max(each.weights for each in report.layouts) >= GIB else ("MiB", MIB)
    yield f"{'layout':24}{'hidden x intermediate':>24}{f'experts {unit}':>14}{f'all weights {unit}':>18}"
    for each in report.layouts:
        padded = f"{each.hidden_size} x {each.intermediate_size}"
        yield f"{each.name:24}{padded:>24}{each.experts / size:14.2f}{each.weights / size:18.2f}"
    rest = ", ".join(f"{name} {nbytes / size:.2f}" for name, nbytes in report.rest.items())
    yield f"BF16 in all of them: {rest} {unit}"
    dense = f"{report.dense_int8 / size:.2f} {unit} instead of {report.dense_bf16 / size:.2f}"
    yield f"dense: int8 keeps attention's projections, lm_head and embedding in {dense}"
    yield ""
    yield from table(report.fits)
    yield ""
    yield from report.problems
    if report.problems:
        yield f"{len(report.problems)} problem{'s' if len(report.problems) > 1 else ''}"
    elif report.layout != "unknown":
        yield "every tensor is as it should be"


def table(fits: list[Fit]) -> Iterator[str]:
    """Requests at once: a row for each card and number of them, columns by cache and context.

    Those with `dense: int8` too, where that makes room for what doesn't fit without.
    """
    columns = list(dict.fromkeys((row.cache, row.context) for row in fits))
    heads = "".join(f"{f'{cache} {context // 1024}K':>11}" for cache, context in columns)
    yield f"{'card':28}{'weights + work GiB':>20}{heads}"
    cells: dict[tuple[str, int, str], list[Fit]] = {}
    for row in fits:
        cells.setdefault((row.card, row.tensor_parallel, row.dense), []).append(row)
    for (card, ranks, dense), row_of in cells.items():
        without = cells[card, ranks, "bf16"]
        if dense == "int8" and not any(a.requests and not b.requests for a, b in zip(row_of, without, strict=True)):
            continue
        first = row_of[0]
        name = f"{'2 x ' if ranks == 2 else ''}{first.memory_gb} GB ({card})"
        counts = "".join(f"{row.requests or '-':>11}" for row in row_of)
        name = "  with dense: int8" if dense == "int8" else name
        yield f"{name:28}{(first.weights + first.working) / GIB:20.1f}{counts}"
    yield "an estimate, for vLLM's defaults; GiB are each card's; with the desktop on the card there is less"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("model", metavar="PATH_OR_REPO", help="a checkpoint's folder, or its name on Hugging Face")
    parser.add_argument("--verify", action="store_true", help="also compare each file with the folder's SHA256SUMS")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> Outcome:
    """Its status is 0, or 1 if something is wrong with the checkpoint."""
    if args.verify and not Path(args.model).is_dir():
        raise WrongArguments(f"--verify reads the files of a folder, and {args.model} is none")
    report = examine(_survey(args.model))
    if args.verify:
        from vllm_mxfp4_sm120.packing import verify

        with progress("comparing", quiet=args.json) as show:
            report.problems += verify(Path(args.model), show)
    return Outcome(lines(report), asdict(report), 1 if report.problems else 0)


def _survey(model: str) -> Survey:
    try:
        return survey(model)
    except ValueError:
        if model not in PUBLISHED or Path(model).exists():
            raise
        return Survey(model, published_config(model), None)  # what is known of it without a network
