# SPDX-License-Identifier: Apache-2.0
"""The entry point, which vLLM calls without a guard: it never raises, and knows the vLLMs that it was written for."""

from __future__ import annotations

import logging

import pytest

from vllm_mxfp4_sm120 import plugin


@pytest.mark.parametrize("function", ["_ask_for_amx", "_vllm_version", "why_unsupported", "_refuse"])
def test_what_goes_wrong_is_one_line(function: str, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("a reason\nand more")

    monkeypatch.setattr(plugin, "_vllm_version", lambda: "9.9")
    monkeypatch.setattr(plugin, function, fails)
    with caplog.at_level(logging.INFO, logger="vllm.mxfp4_sm120"):
        plugin.register()
    assert [record.getMessage() for record in caplog.records] == [
        f"mxfp4_sm120 {plugin.__version__} is off: RuntimeError: a reason"
    ]


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("0.32.0", True),
        ("0.32.1+cpu", True),
        ("0.33.0.dev5+g1234", True),
        ("0.34.0rc1", False),
        ("0.31.9", False),
        ("1.0", False),
        ("dev", False),
        ("", False),
    ],
)
def test_which_vllm(version: str, supported: bool, monkeypatch) -> None:
    monkeypatch.delenv("MXFP4_SM120_ANY_VLLM", raising=False)
    reason = plugin.why_unsupported(version)
    assert reason == (
        None if supported else "it was written for vLLM >= 0.32, < 0.34; MXFP4_SM120_ANY_VLLM=1 tries any other"
    )
    monkeypatch.setenv("MXFP4_SM120_ANY_VLLM", "1")
    assert plugin.why_unsupported(version) is None
