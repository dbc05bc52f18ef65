# SPDX-License-Identifier: Apache-2.0
"""setuptools' build backend, which also asks pip for a CUDA compiler where the library is to be built without one."""

import runpy
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 (the hooks that stay setuptools' own)

KERNELS = runpy.run_path(str(Path(__file__).parents[1] / "kernels" / "setup.py"))


def get_requires_for_build_wheel(config_settings=None):
    return [*KERNELS["requirements"](), *build_meta.get_requires_for_build_wheel(config_settings)]


def get_requires_for_build_editable(config_settings=None):
    return [*KERNELS["requirements"](), *build_meta.get_requires_for_build_editable(config_settings)]
