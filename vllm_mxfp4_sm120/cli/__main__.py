# SPDX-License-Identifier: Apache-2.0
"""`mxfp4-sm120 COMMAND`: each command is a module beside this one with `add_arguments(parser)` and `run(args) -> int`.

Only the chosen command's module is imported, so that `mxfp4-sm120 --help` is instant.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "build": "compile the CUDA library for this machine's card",
    "make-tiny": "write a small GPT-OSS checkpoint with MXFP4 experts, for tests and demonstrations",
    "bench": "time the layers on this machine, beside vLLM's kernels and beside what no kernel can beat",
    "doctor": "say what is here, which backends can serve with it, and what would be chosen",
    "tune": "time this card's kernels, and let each compute what it is fastest at",
    "inspect": "say what a checkpoint holds, what is wrong with it, and on which cards it fits",
    "pack": "turn a BF16 GPT-OSS, such as a fine-tune, into one with MXFP4 experts",
    "unpack": "turn MXFP4 experts back into BF16, as transformers keeps them",
    "serve": "start vllm serve with this plugin, send one completion, show who answered",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the process's exit status: 0, or 1 with the reason on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    passed_on: list[str] = []
    if "--" in arguments:  # argparse mixes what follows with a command's own options
        here = arguments.index("--")
        arguments, passed_on = arguments[:here], arguments[here + 1 :]
    parser = argparse.ArgumentParser(prog="mxfp4-sm120", description="MXFP4 GPT-OSS experts for vLLM")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in arguments[:1]:
            module = importlib.import_module(f"vllm_mxfp4_sm120.cli.{name.replace('-', '_')}")
            module.add_arguments(command)
    args = parser.parse_args(arguments, argparse.Namespace(passed_on=passed_on))
    try:
        return int(module.run(args))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"mxfp4-sm120 {args.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
