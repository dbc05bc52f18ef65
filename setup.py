"""The package, and the CUDA library where this machine can build it."""

from setuptools import find_packages, setup

VERSION = "0.1.0"

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
    install_requires=["packaging", "safetensors", "tokenizers", "torch>=2.11"],
    extras_require={
        "test": ["hypothesis", "mypy", "pytest", "ruff", "transformers"],
        "bench": ["rich"],
    },
    entry_points={
        "vllm.general_plugins": ["mxfp4_sm120 = vllm_mxfp4_sm120.plugin:register"],
        "console_scripts": ["mxfp4-sm120 = vllm_mxfp4_sm120.cli.__main__:main"],
    },
)
