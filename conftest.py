# SPDX-License-Identifier: Apache-2.0
"""The tests' options, and what tests of several kinds use.

The options can't stand in tests/: before pytest knows --replay, it takes the FILE behind it for a test's place.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# What all tests import is a million objects and stays. Looking through them takes half a second each time.
gc.disable()

# The same examples in every run, however slow the machine: what fails, a change broke. --hypothesis-profile=default
# searches for others.
settings.register_profile("steady", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")

# More than 20 seconds on two cores: engines that start, libraries that are compiled. `-m 'not slow'` leaves them out.
SLOW = (
    "tests/conformance/test_conformance.py::test_native_in_its_emulator",
    "tests/engine/",
    "tests/faults/test_engine_faults.py",
    "tests/kernels/",
    "tests/packaging/test_wheel.py",
    "tests/packaging/test_flashinfer_releases.py",
)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For problems so small that threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def pytest_configure(config: pytest.Config) -> None:
    """Side by side, a test and what it starts have their part of the cores, to none of which vLLM binds them."""
    if hasattr(config, "workerinput"):
        threads = max(1, (os.cpu_count() or 1) // config.workerinput["workercount"])
        torch.set_num_threads(threads)
        os.environ |= {"OMP_NUM_THREADS": f"{threads}", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what Triton leaves uncollected at its process's end, it reports as a leak


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --replay, nothing but that; the marker of slow tests; side by side, the slow files first."""
    replay = config.getoption("--replay") is not None
    items[:] = [item for item in items if (item.name == "test_replay") is replay]
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
    gc.freeze()
    gc.enable()
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)
