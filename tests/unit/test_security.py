# SPDX-License-Identifier: Apache-2.0
"""Lines of SECURITY.md that no other test holds."""

import re
from pathlib import Path

import vllm_mxfp4_sm120
from vllm_mxfp4_sm120 import settings
from vllm_mxfp4_sm120.backends.native import library

PACKAGE = Path(vllm_mxfp4_sm120.__file__).parent
SOURCES = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}


def users(pattern):
    return {name for name, text in SOURCES.items() if re.search(pattern, text)}


def test_the_library_is_the_packages():
    assert library.LIBRARY.parent == PACKAGE
    assert not [variable.name for variable in settings.TABLE if "LIBRARY" in variable.name or "PATH" in variable.name]


def test_no_pickle_and_no_code():
    assert not users(r"\bpickle\b|torch\.load\b|\beval\(|(?<!def )\bexec\(|trust_remote_code")


def test_who_opens_connections():
    assert users(r"urllib|http\.client|requests\.|httpx") == {"cli/server.py"}


def test_every_test_that_is_named_exists():
    root = Path(__file__).parents[2]
    named = re.findall(r"`(tests/[\w/.]+)`", (root / "SECURITY.md").read_text())
    assert len(named) >= 8 and all((root / name).exists() for name in named)
