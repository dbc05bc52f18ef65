# SPDX-License-Identifier: Apache-2.0
"""The CUDA library, its stub and the emulated kernels, each compiled once for all tests."""

from __future__ import annotations

import ctypes
import functools
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import MadeOnce
from tests.kernels import emulated
from tests.kernels.building import KERNELS, build

LIBRARY = "_native.so"


@pytest.fixture(scope="session")
def library(made_once: MadeOnce) -> Path:
    if runpy.run_path(str(KERNELS / "setup.py"))["nvcc"]() is None:
        pytest.skip("nvcc isn't here to compile with")
    cards = "8.0 9.0 12.0 12.1"
    made = made_once("native", lambda folder: build("--native", "-o", folder / LIBRARY, TORCH_CUDA_ARCH_LIST=cards))
    return made / LIBRARY


@pytest.fixture(scope="session")
def stub(made_once: MadeOnce) -> Path:
    return made_once("stub", lambda folder: build("--stub", "-o", folder / LIBRARY)) / LIBRARY


@pytest.fixture(scope="session")
def libraries() -> Callable[[int], ctypes.CDLL]:
    """The emulated kernels as for cards of a __CUDA_ARCH__."""
    return functools.cache(lambda arch: emulated.build(arch=arch))
