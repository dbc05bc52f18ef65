# SPDX-License-Identifier: Apache-2.0
"""`mxfp4-sm120 unpack SRC DST`: a GPT-OSS with MXFP4 experts as BF16, in the layout that transformers trains."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_mxfp4_sm120.cli.ending import Outcome
from vllm_mxfp4_sm120.cli.pack import add_common, device, shard_bytes
from vllm_mxfp4_sm120.cli.progress import progress

EXAMPLE = """example:
  mxfp4-sm120 unpack ./gpt-oss-20b ./gpt-oss-20b-bf16

Nothing is lost: `mxfp4-sm120 pack` makes the same bytes of it again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument("source", type=Path, metavar="SRC", help="the folder of the packed model")
    parser.add_argument("target", type=Path, metavar="DST", help="the folder to write; must not exist yet")
    add_common(parser)


def run(args: argparse.Namespace) -> Outcome:
    """Raises ValueError; KeyboardInterrupt, which says how to go on."""
    from vllm_mxfp4_sm120.packing import unpack

    with progress("unpacking", quiet=args.json) as show:
        unpack(args.source, args.target, device(args), shard_bytes(args), show)
    return Outcome([f"wrote {args.target}"], {"directory": str(args.target)})
