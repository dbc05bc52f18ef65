# SPDX-License-Identifier: Apache-2.0
"""`mxfp4-sm120 serve MODEL`: vllm serve with this plugin on a free port, one completion, and who answered it."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vllm_mxfp4_sm120.cli.ending import Outcome
from vllm_mxfp4_sm120.cli.server import HOST, Server, first_error, free_port

__all__ = ["HOST", "Server", "first_error", "free_port"]

# Whoever reads English can tell whether what follows makes sense; the small model of models/ learned this book.
EXAMPLES = """examples:
  mxfp4-sm120 serve openai/gpt-oss-20b
  mxfp4-sm120 serve ./gpt-oss-20b --port 8000 -- --max-model-len 8192 --tensor-parallel-size 2
  mxfp4-sm120 serve ./gpt-oss-20b --once

What follows -- goes to vllm serve as it is. Ctrl-C ends the server, too.
"""
PROMPT = "It is a truth universally acknowledged, that"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a checkpoint's directory or its name on the hub")
    parser.add_argument("--port", type=port, help=f"of {HOST} (default: one that is free)")
    parser.add_argument("--prompt", default=PROMPT, help=f"of the completion (default: {PROMPT!r})")
    parser.add_argument("--max-tokens", type=positive, default=32, help="of the completion (default 32)")
    parser.add_argument("--once", action="store_true", help="stop after the completion")
    parser.epilog = EXAMPLES


def port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:6]) <= 65535 and len(text) < 7):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: expected 1 to 65535")
    return int(text)


def positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def run(args: argparse.Namespace) -> Outcome:
    """Says what it does as it does it. Raises what went wrong."""
    extra = list(args.passed_on)
    options = [argument.partition("=")[0] for argument in extra]
    if "--config" not in options and not {"--quantization", "-q"} & set(options):
        extra = ["--quantization", "mxfp4_sm120", *extra]
    folder = Path(tempfile.mkdtemp(prefix="mxfp4-sm120-"))
    answered = False
    try:
        with Server(args.model, extra, folder / "server.log", args.port) as server:
            print("starting:", " ".join(without_keys(server.command)), flush=True)
            print(f"its log:  {server.log}\nwaiting until it is healthy: a minute or two, longer for a large model")
            sys.stdout.flush()
            seconds = server.wait_until_healthy()
            print(f"healthy after {seconds:.0f} s at {server.url}\n")
            completion = server.complete(args.prompt, args.max_tokens)
            print(f"prompt:      {args.prompt!r}\ncompletion:  {completion['choices'][0]['text']!r}")
            print(
                f"answered by: {server.answered_by() or 'NOT this plugin: vLLM used a method of its own'}", flush=True
            )
            answered = True
            if not args.once:
                print(f"\nserving {args.model} at {server.url}/v1/completions until Ctrl-C", flush=True)
                server.process.wait()
                answered = False
                raise RuntimeError(f"the server ended by itself, exit status {server.process.returncode}")
    finally:
        if answered or not (folder / "server.log").exists():
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"the server's log is kept: {folder / 'server.log'}", file=sys.stderr)
    return Outcome()


def without_keys(command: Sequence[str]) -> list[str]:
    """The command as it may be shown: with no API key in it."""
    shown, secret = [], False
    for argument in command:
        name, equals, _ = argument.replace("_", "-").partition("=")
        if name.startswith("-"):
            secret = name == "--api-key"
            shown.append(f"{name}=***" if secret and equals else argument)
        else:
            shown.append("***" if secret else argument)
    return shown
