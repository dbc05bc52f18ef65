# SPDX-License-Identifier: Apache-2.0
"""`mxfp4-sm120 pack SRC DST`: a BF16 GPT-OSS, such as a fine-tune, with its experts packed to MXFP4."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vllm_mxfp4_sm120.cli.ending import Outcome, WrongArguments
from vllm_mxfp4_sm120.cli.progress import progress

if TYPE_CHECKING:
    from vllm_mxfp4_sm120.packing.pack import Options, Report

EXAMPLES = """examples:
  mxfp4-sm120 pack ./my-finetune ./my-finetune-mxfp4
  mxfp4-sm120 pack ./gpt-oss-20b ./merged --adapter ./my-lora --search

The result is served by vLLM, with this plugin or without, and read by transformers. What ends the run leaves
DST.partial; the same command goes on from there.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("source", type=Path, metavar="SRC", help="the folder of the BF16 model, as it was saved")
    parser.add_argument("target", type=Path, metavar="DST", help="the folder to write; must not exist yet")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="a LoRA as PEFT saves it, to be merged")
    parser.add_argument(
        "--search", action="store_true", help="of neighbouring scales take the one with the least squared error"
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="TEXT",
        help="a file of text like the model's work; --search then weighs errors by what the weights are multiplied by",
    )
    add_common(parser)


def add_common(parser: argparse.ArgumentParser) -> None:
    """What `unpack` has, too."""
    parser.add_argument("--device", help="that computes (default: the GPU, if there is one)")
    parser.add_argument("--shard-gb", type=float, default=1.0, metavar="GB", help="size of a file (default 1)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> Outcome:
    """Raises ValueError; KeyboardInterrupt, which says how to go on."""
    from vllm_mxfp4_sm120.packing import Options, pack

    options = Options(args.search, args.adapter, device=device(args), shard_bytes=shard_bytes(args))
    options = calibrated(options, args)
    with progress("packing", quiet=args.json) as show:
        report = pack(args.source, args.target, options, show)
    return Outcome(lines(report), asdict(report))


def calibrated(options: Options, args: argparse.Namespace) -> Options:
    """With what `pack` weighs errors by, where --calibrate asks for it. Raises ValueError."""
    if args.calibrate is None:
        return options
    if not args.search:
        raise WrongArguments("--calibrate weighs the errors that --search compares; give --search, too")
    from vllm_mxfp4_sm120.packing.calibrate import second_moments
    from vllm_mxfp4_sm120.packing.source import Source

    source = Source(args.source, args.adapter)
    try:
        text = args.calibrate.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--calibrate {args.calibrate} is no text in UTF-8: {error.reason} at {error.start}") from None
    with progress("calibrating", quiet=args.json, unit="layers") as show:
        moments = second_moments(source, text, options.device, show)
    return replace(options, moments=moments, text=hashlib.sha256(text.encode()).hexdigest())


def device(args: argparse.Namespace) -> torch.device:
    """The torch.device that --device names. Raises WrongArguments."""
    if args.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        why = "expected cpu, or cuda for a GPU" if "device type at start of device string" in why else why
        raise WrongArguments(f"--device {args.device}: {why}") from error
    return torch.device(args.device)


def shard_bytes(args: argparse.Namespace) -> int:
    """Raises WrongArguments."""
    if not 0 < args.shard_gb <= 1000:
        raise WrongArguments(f"--shard-gb is {args.shard_gb}, expected more than 0 and at most 1000")
    return int(args.shard_gb * 2**30)


def lines(report: Report) -> Iterator[str]:
    """The table of errors, and what became of the rest."""
    yield f"{'layer':>5}  {'projection':12}  {'relative RMS':>12}  {'SQNR':>8}"
    for each in report.projections:
        rms, decibels = each.relative_rms, each.sqnr_db
        error = "packed already" if rms is None else f"{rms:12.4f}" if rms else "       exact"
        yield f"{each.layer:5}  {each.projection:12}  {error}" + (f"  {decibels:5.1f} dB" if decibels else "")
    yield from (f"left out: {name}, which GPT-OSS has no place for" for name in report.left_out)
    if not report.tokenizer:
        yield "no tokenizer was beside the weights: copy the base model's tokenizer files into the folder"
    yield f"wrote {report.directory}"
