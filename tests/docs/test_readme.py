# SPDX-License-Identifier: Apache-2.0
"""What the README quotes, and that it stays short."""

import re

import pytest
import torch

from tests.docs.pages import ROOT, Page
from vllm_mxfp4_sm120 import __version__
from vllm_mxfp4_sm120.backends.native import library
from vllm_mxfp4_sm120.cli import doctor

README = Page(ROOT / "README.md")


def test_it_is_short() -> None:
    assert len(README.text.splitlines()) <= 150


@pytest.mark.skipif(torch.cuda.is_available(), reason="it quotes a machine without a GPU")
def test_the_doctor_says_what_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Line by line, but for numbers that depend on the machine, and for what takes an engine or a proof to find out."""
    monkeypatch.setattr(doctor.surroundings, "other_pythons", list)
    [quoted] = [block for block in README.blocks("") if block.startswith("mxfp4-sm120 ")]
    said = list(doctor.lines(doctor.examine(prove=False)))
    assert quoted.startswith(f"mxfp4-sm120 {__version__} ")

    def shape(line: str) -> str:
        """A line without numbers, versions and verdicts."""
        return re.sub(r"ready.*?(?=\(|$)|too little.*|the KV cache.*|\d[\w.+]*", "", line).rstrip()

    expected = [shape(line) for line in quoted.splitlines()[1:] if line and not line.startswith("attention")]
    found = [shape(line) for line in "\n".join(said).splitlines()[1:] if line and not line.startswith("attention")]
    if library.LIBRARY.exists():
        expected, found = (
            [x for x in each if "CUDA library" not in x and "native" not in x] for each in (expected, found)
        )
    assert found == expected
