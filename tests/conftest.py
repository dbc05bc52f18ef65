# SPDX-License-Identifier: Apache-2.0
"""What tests of every kind share."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from vllm_mxfp4_sm120 import config_path
from vllm_mxfp4_sm120.cli.make_tiny import make_tiny


@pytest.fixture(scope="session", autouse=True)
def signals() -> None:
    """Children don't inherit that SIGINT (by a shell, in the background) or SIGHUP (by nohup) is ignored.

    Tests send both. This process goes on ignoring SIGHUP.
    """
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, lambda *_: None)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> MadeOnce:
    """Makes a folder of that name, once for all processes that run tests side by side, and says where it is."""
    root = tmp_path_factory.getbasetemp()
    if hasattr(pytestconfig, "workerinput"):  # pytest-xdist's processes have a folder each, in this one
        root = root.parent

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder, draft = root / name, root / f"{name}-draft"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                shutil.rmtree(draft, ignore_errors=True)  # of one who failed
                draft.mkdir()
                make(draft)
                draft.rename(folder)
        return folder

    return once


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


@pytest.fixture(scope="session")
def transformers_model(tiny: Path):
    """transformers' GptOssForCausalLM of the same checkpoint: dequantized by transformers, computed in float32."""
    from transformers import GptOssForCausalLM, Mxfp4Config

    model = GptOssForCausalLM.from_pretrained(
        tiny, quantization_config=Mxfp4Config(dequantize=True), attn_implementation="eager"
    )
    model.generation_config.eos_token_id = None
    return model.float().eval()
