# SPDX-License-Identifier: Apache-2.0
"""The CUDA library, its stub and the emulated kernels, each compiled once for all tests."""

from __future__ import annotations

import ctypes
import functools
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernels import emulated
from tests.kernels.building import KERNELS, build


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if runpy.run_path(str(KERNELS / "setup.py"))["nvcc"]() is None:
        pytest.skip("nvcc isn't here to compile with")
    path = tmp_path_factory.mktemp("native") / "_native.so"
    build("--native", "-o", path, TORCH_CUDA_ARCH_LIST="8.0 9.0 12.0 12.1")
    return path


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stub") / "_native.so"
    build("--stub", "-o", path)
    return path


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], ctypes.CDLL]:
    """The emulated kernels as for cards of a __CUDA_ARCH__."""
    return functools.cache(lambda arch: emulated.build(tmp_path_factory.mktemp("emulated"), arch=arch))
