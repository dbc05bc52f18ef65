# SPDX-License-Identifier: Apache-2.0
"""What several files of unit tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_mxfp4_sm120.backends import tuning


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user of whom nothing is known yet: no rule of his own for a card, nothing cached."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("MXFP4_SM120_CACHE_DIR", str(tmp_path / "cache"))
    tuning.warn.cache_clear()
    return tmp_path
