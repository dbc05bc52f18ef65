"""What tests of every kind share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_mxfp4_sm120 import config_path
from vllm_mxfp4_sm120.cli.make_tiny import make_tiny


@pytest.fixture(scope="session")
def tiny_config() -> dict:
    """config.json of the tiny checkpoint."""
    return json.loads(config_path("tiny", "config.json").read_text())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_config: dict) -> Path:
    """The tiny checkpoint, to be read only."""
    directory = tmp_path_factory.mktemp("checkpoints") / "tiny"
    make_tiny(directory, tiny_config)
    return directory


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance", "tests/conformance")
    group.addoption("--conformance-cases", type=int, default=500, help="how many random cases (500)")
    group.addoption("--conformance-seed", type=int, default=0, help="which ones (0)")
    group.addoption("--conformance-device", default="cpu", help="where --replay runs (cpu)")
    group.addoption("--replay", metavar="FILE", help="run the failing case in that file, and nothing else")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.getoption("--replay") is None or collection_path.is_dir():
        return None
    return collection_path.name != "test_conformance.py" or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --replay, nothing but that."""
    replay = config.getoption("--replay") is not None
    items[:] = [item for item in items if (item.name == "test_replay") is replay]
