# SPDX-License-Identifier: Apache-2.0
"""`mxfp4-sm120 bench`: how fast this machine computes GPT-OSS's layers, beside vLLM's kernels and the limit."""

from __future__ import annotations

import argparse
import io
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from vllm_mxfp4_sm120 import proof, selector
from vllm_mxfp4_sm120.bench import dense, experts, limits, measure, plot
from vllm_mxfp4_sm120.bench.limits import Rates
from vllm_mxfp4_sm120.bench.measure import Bench
from vllm_mxfp4_sm120.bench.models import DENSE, LAYERS, model
from vllm_mxfp4_sm120.bench.table import Table
from vllm_mxfp4_sm120.cli.ending import Outcome, WrongArguments
from vllm_mxfp4_sm120.cli.progress import progress
from vllm_mxfp4_sm120.platform import Machine

LAYER_NAMES = ("experts", *DENSE)
TOKENS = {"experts": "1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192", "dense": "1,2,4,8,16,32,64,128,256,512"}
TOKENS_ON_CPU = "1,4,16,64"
EXAMPLES = """examples:
  mxfp4-sm120 bench
  mxfp4-sm120 bench --layers experts --backends native,vllm-marlin --tokens 1,8,64,512 --plot layer.svg
  mxfp4-sm120 bench --model 120b --tp 2 --json

Each time is the median of CUDA-graph replays that walk over several layers' weights, so that the L2 cache never holds
the next call's; all take turns, and each was right before it was timed. "limit" is what reading the weights once takes,
or multiplying, whichever is longer, at the rates that this machine reached in the same run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("--model", choices=LAYERS, help="whose layers (default: 20b on a GPU, tiny on a CPU)")
    parser.add_argument("--layers", metavar="NAMES", help=f"of {','.join(LAYER_NAMES)} (default: all)")
    parser.add_argument(
        "--backends", metavar="NAMES", help=f"of {','.join(experts.ALL + dense.ALL)}, or their beginnings"
    )
    parser.add_argument("--tokens", metavar="NUMBERS", help="such as 1,8,64 (default: 1 to 8192, and to 512 for dense)")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="the shard of one of so many ranks")
    parser.add_argument("--skew", action="store_true", help="half of all choices fall on 2 experts")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it, too: a .png or .svg; needs matplotlib")


def run(args: argparse.Namespace) -> Outcome:
    """Its status is 0, or 1 if nothing could be measured or drawn. Raises WrongArguments."""
    if args.plot is not None and (reason := plot.why_not(args.plot)):
        raise WrongArguments(reason)
    layers = chosen_layers(args.layers)
    wanted = chosen_backends(args.backends)
    tokens = None if args.tokens is None else chosen_tokens(args.tokens)
    machine = selector.this_machine()
    if reason := machine.why_unsupported():
        raise RuntimeError(reason)
    rates, tables = examine(args, machine, layers, wanted, tokens)
    status = 0 if any(table.compared for table in tables) else 1
    if args.plot is not None and status == 0:
        try:
            plot.draw(tables, args.plot)
        except OSError as error:  # what took minutes to measure is said all the same
            print(f"mxfp4-sm120 bench: --plot {args.plot}: {error.strerror or error}", file=sys.stderr)
            status = 1
    return Outcome(lines(rates, tables, machine), measure.report(rates, tables, machine, versions()), status)


@torch.inference_mode()
def examine(
    args: argparse.Namespace,
    machine: Machine,
    layers: Sequence[str],
    wanted: Sequence[str] | None,
    tokens: Sequence[int] | None,
) -> tuple[Rates, list[Table]]:
    """Measure everything that was asked for. Raises WrongArguments for ranks that don't divide the layers."""
    on_cpu = machine.capability is None
    try:
        sizes = model(args.model or ("tiny" if on_cpu else "20b"), args.tp)
    except ValueError as error:
        raise WrongArguments(f"--tp {args.tp}: {error}") from None
    with progress("measuring", quiet=args.json, unit="sizes") as step:
        step("the machine", 0, 1)
        device = proof.device(machine)
        if not on_cpu:
            torch.cuda.set_device(device)
        rates = limits.measured(device)
        bench = Bench(machine, device, rates, where(machine), command(args), step)
        tables = []
        for layer in layers:
            kind = "experts" if layer == "experts" else "dense"
            numbers = tokens or chosen_tokens(TOKENS_ON_CPU if on_cpu else TOKENS[kind])
            if layer == "experts":
                names = measure.chosen(wanted, experts.names(machine), experts.ALL)
                table = measure.experts_table(bench, sizes, numbers, names, args.skew)
            else:
                names = measure.chosen(wanted, dense.names(machine), dense.ALL)
                table = measure.dense_table(bench, sizes, layer, numbers, names)
            tables.append(table)
            if not on_cpu:
                torch.cuda.empty_cache()
    return rates, tables


def lines(rates: Rates, tables: Sequence[Table], machine: Machine) -> Iterator[str]:
    """The report for people."""
    yield f"{where(machine)}: {rates}"
    if machine.capability is None:
        yield "no NVIDIA GPU: these are the CPU's paths, which say nothing about any card"
    for table in tables:
        yield f"\n{table.what}"
        yield drawn(table)
        yield from (f"{name}: {reason}" for name, reason in table.left_out.items())


def drawn(table: Table) -> str:
    """The table, the fastest of each row bold on a terminal. A narrow one wraps lines: no number is cut off."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable(box=None, pad_edge=False)
    for column in table.columns:
        grid.add_column(column, justify="right", no_wrap=True)
    for row in table.rows:
        times = dict(zip(table.columns, row, strict=True))
        best = min((time for name in table.compared if (time := times[name]) is not None), default=None)
        cells = ("-" if cell is None else f"{cell:,.1f}" if isinstance(cell, float) else str(cell) for cell in row)
        grid.add_row(
            *(
                Text(cell, "bold" if name in table.compared and times[name] == best else "")
                for name, cell in zip(table.columns, cells, strict=True)
            )
        )
    if table.errors:
        grid.add_section()
        errors = (f"{table.errors[name]:.1e}" if name in table.errors else "" for name in table.columns[1:])
        grid.add_row("error", *errors)
    text, terminal = io.StringIO(), sys.stdout is not None and sys.stdout.isatty()
    Console(file=text, force_terminal=terminal, width=1000, highlight=False).print(grid)
    return text.getvalue().removesuffix("\n")


def where(machine: Machine) -> str:
    """The machine and what was installed, for captions."""
    found = versions()
    vllm = f"vLLM {found['vLLM']}, " if found["vLLM"] else ""
    threads = f" ({torch.get_num_threads()} threads)" if machine.capability is None else ""
    return f"{'CPU' if machine.capability is None else machine.name}{threads}, {vllm}torch {found['torch']}"


def versions() -> dict[str, str | None]:
    """Of what takes part; None for what isn't there."""
    found: dict[str, str | None] = {"torch": torch.__version__, "CUDA of torch": torch.version.cuda}
    return found | {"vLLM": proof.version("vllm"), "Triton": proof.version("triton")}


def command(args: argparse.Namespace) -> str:
    """What repeats a measurement, without what it's written to."""
    words = ["mxfp4-sm120", "bench"]
    for option in ("model", "layers", "backends", "tokens"):
        if (value := getattr(args, option)) is not None:
            words += [f"--{option}", value]
    words += ["--tp", str(args.tp)] if args.tp != 1 else []
    return shlex.join(words + ["--skew"] * args.skew)


def chosen_layers(text: str | None) -> list[str]:
    """Raises WrongArguments for one that isn't of LAYER_NAMES."""
    return list(LAYER_NAMES) if text is None else _words("--layers", text, LAYER_NAMES)


def chosen_backends(text: str | None) -> list[str] | None:
    """Raises WrongArguments for a word that no name begins with."""
    if text is None:
        return None
    every = (*experts.ALL, *dense.ALL)
    beginnings = {name[:at] for name in every for at in range(len(name)) if name[at] == "-"}
    return _words("--backends", text, every, beginnings)


def _words(option: str, text: str, expected: Sequence[str], also: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in expected and word not in also:
            raise WrongArguments(f"{option} has {word!r}, expected some of {', '.join(expected)}")
    return words


def chosen_tokens(text: str) -> list[int]:
    """Raises WrongArguments for what isn't a list of numbers from 1 to 65536."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = [0]
    if not all(0 < number <= 65536 for number in numbers):
        raise WrongArguments(f"--tokens is {text!r}, expected numbers from 1 to 65536, such as 1,8,64")
    return sorted(set(numbers))
