"""MXFP4 GPT-OSS experts for vLLM, packed from disk to tensor core."""

__version__ = "0.1.0"
