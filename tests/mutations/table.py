# SPDX-License-Identifier: Apache-2.0
"""What a mutation is, and the table of all of them: `python -m tests.mutations.table` writes README.md."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

README = Path(__file__).with_name("README.md")
# Modules of this folder with MUTATIONS, all of the files in FOLDER with that SUFFIX, and what the table calls them.
TABLES = {
    "backends": "A backend",
    "kernels": "The native kernels, in their emulator",
    "triton": "The Triton kernels, in their interpreter",
    "checkpoint": "The checkpoint's reader, its checks and its writer",
}
INTRODUCTION = """# Mutations

Deliberate faults, and what catches each. Every row is put in by the tests beside this file, which fail if it goes
unnoticed: by the *proof* that a backend goes through before it serves (`proof.solve`), by the *conformance* suite
(`tests/conformance`), or by the test that is named. Generated: `python -m tests.mutations.table`.
"""


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` in a module; `caught_by` notices."""

    name: str
    module: str
    old: str
    new: str
    caught_by: str


def render() -> str:
    """The table in Markdown."""
    text = INTRODUCTION
    for name, title in TABLES.items():
        module = import_module(f"tests.mutations.{name}")
        text += f"\n## {title}\n\n| Fault | Where | Instead of | Stands | Caught by |\n|---|---|---|---|---|\n"
        for mutation in module.MUTATIONS:
            where = f"{module.PACKAGE}.{mutation.module}".removeprefix("vllm_mxfp4_sm120.")
            cells = (mutation.name, f"`{where}`", _code(mutation.old), _code(mutation.new), mutation.caught_by)
            text += f"| {' | '.join(cells)} |\n"
    return text


def _code(text: str) -> str:
    """One line of code for a cell of a table."""
    text = " ".join(text.split()).replace("|", "\\|")
    return f"`{text}`" if text else "nothing"


if __name__ == "__main__":
    README.write_text(render())
