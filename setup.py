"""The package, and the CUDA library where this machine can build it."""

import runpy
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

VERSION = "0.1.0"
KERNELS = runpy.run_path(str(Path(__file__).parent / "kernels" / "setup.py"))


class BuildPy(build_py):
    """The library first: wheels and editable installs then both hold it."""

    def run(self):
        KERNELS["build"]()
        super().run()


class Wheel(bdist_wheel):
    """With the library, a wheel is for one platform, but for every Python: it needs torch's stable ABI, no Python's."""

    def get_tag(self):
        python, abi, platform = super().get_tag()
        if KERNELS["LIBRARY"].exists():
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        return python, abi, platform


setup(
    name="vllm-mxfp4-sm120",
    version=VERSION,
    description="GPT-OSS in vLLM with MXFP4 experts that stay packed, from consumer Blackwell to CPU",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["vllm_mxfp4_sm120", "vllm_mxfp4_sm120.*"]), "vllm_mxfp4_sm120.configs"],
    # configs/ lies beside the package in the repository and inside it in a wheel.
    package_dir={"vllm_mxfp4_sm120.configs": "configs"},
    package_data={"vllm_mxfp4_sm120": ["*.so"], "vllm_mxfp4_sm120.configs": ["**/*.json", "**/*.yaml"]},
    install_requires=["filelock", "packaging", "safetensors", "tokenizers", "torch>=2.11", "tqdm"],
    extras_require={
        # The two nvidia-cuda packages read machine code: the tests look into the library.
        "test": [
            "hypothesis",
            "mypy",
            "nvidia-cuda-cuobjdump",
            "nvidia-cuda-nvdisasm",
            "pytest",
            "ruff",
            "transformers",
        ],
        "bench": ["rich"],
    },
    cmdclass={"build_py": BuildPy, "bdist_wheel": Wheel},
    entry_points={
        "vllm.general_plugins": ["mxfp4_sm120 = vllm_mxfp4_sm120.plugin:register"],
        "console_scripts": ["mxfp4-sm120 = vllm_mxfp4_sm120.cli.__main__:main"],
    },
)
