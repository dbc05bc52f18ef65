# SPDX-License-Identifier: Apache-2.0
"""`mxfp4-sm120 COMMAND`: each command is a module beside this one, `add_arguments(parser)` and `run(args) -> Outcome`.

Only the chosen command's module is imported, so that `mxfp4-sm120 --help` is instant.
"""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from types import ModuleType
from typing import NoReturn

from vllm_mxfp4_sm120 import __version__
from vllm_mxfp4_sm120.cli.ending import (
    NOBODY_READS,
    STOPPED,
    WRONG_ARGUMENTS,
    Outcome,
    WrongArguments,
    failed,
    in_words,
    settle,
    unwind_on_signals,
)

COMMANDS = {
    "doctor": "say what is here, which backends can serve with it, and what would be chosen",
    "serve": "start vllm serve with this plugin, send one completion, show who answered",
    "inspect": "say what a checkpoint holds, what is wrong with it, and on which cards it fits",
    "bench": "time the layers on this machine, beside vLLM's kernels and beside what no kernel can beat",
    "tune": "time this card's kernels, and let each compute what it is fastest at",
    "pack": "turn a BF16 GPT-OSS, such as a fine-tune, into one with MXFP4 experts",
    "unpack": "turn MXFP4 experts back into BF16, as transformers keeps them",
    "build": "compile the CUDA library for this machine's card",
    "make-tiny": "write a small GPT-OSS checkpoint with MXFP4 experts, for tests and demonstrations",
}
EPILOG = "mxfp4-sm120 COMMAND --help has examples."


class Parser(argparse.ArgumentParser):
    """Wrong arguments are one line, as everything else that goes wrong."""

    def error(self, message: str) -> NoReturn:
        raise WrongArguments(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the process's exit status.

    That is 0; 1 with the reason on stderr; 2 for wrong arguments; 130 after Ctrl-C; 141 where whoever read the output
    has stopped reading.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        unwind_on_signals()
        if isinstance(sys.stdout, io.TextIOWrapper):  # a path may hold what its encoding hasn't
            sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return dispatch(arguments)
    except BrokenPipeError:
        return NOBODY_READS
    finally:
        settle()


def dispatch(arguments: list[str]) -> int:
    """As `main`. Raises BrokenPipeError."""
    here = arguments.index("--") if "--" in arguments else len(arguments)
    arguments, passed_on = arguments[:here], arguments[here + 1 :]  # argparse would mix them
    name, as_json = next(iter(arguments), ""), "--json" in arguments
    try:
        module, args = parsed(arguments, passed_on)
        # What libraries print isn't the report; a command without one prints by itself.
        with redirect_stdout(sys.stderr) if "json" in args else nullcontext():
            outcome: Outcome = module.run(args)
        return outcome.tell(as_json)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt as stopped:
        return failed(name, str(stopped) or "stopped", as_json, STOPPED)
    except WrongArguments as wrong:
        return failed(name, str(wrong), as_json, WRONG_ARGUMENTS)
    except (ValueError, RuntimeError, OSError, ImportError, MemoryError) as error:
        return failed(name, in_words(error), as_json)


def parsed(arguments: list[str], passed_on: Sequence[str] = ()) -> tuple[ModuleType, argparse.Namespace]:
    """The command's module, and its arguments; `passed_on` is what followed --. --help ends the program.

    Raises WrongArguments.
    """
    parser = Parser(prog="mxfp4-sm120", description="MXFP4 GPT-OSS experts for vLLM", epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    module, chosen = None, parser
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in arguments[:1]:
            module = importlib.import_module(f"vllm_mxfp4_sm120.cli.{name.replace('-', '_')}")
            module.add_arguments(chosen := command)
    args, unknown = parser.parse_known_args(arguments, argparse.Namespace(passed_on=passed_on))
    if unknown:
        chosen.error(f"unrecognized arguments: {' '.join(unknown)}")
    assert module is not None  # argparse wants a command first
    return module, args


if __name__ == "__main__":
    sys.exit(main())
