# SPDX-License-Identifier: Apache-2.0
"""Loads models as vLLM does, one process for many: python -m tests.faults.engine RESULT < [[folder, arguments]...]

Each is configured and loaded, without a KV cache, by arguments of EngineArgs. Of each, RESULT holds [line of the error,
null] or [null, {parameter: digest}], experts as the backend holds them.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.support.warm import collect_no_more


def digests(model: Any) -> dict[str, str]:
    import torch

    def digest(tensor: torch.Tensor) -> str:
        return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()

    return {name: digest(parameter.data.cpu()) for name, parameter in model.named_parameters() if parameter.numel()}


def line(error: BaseException) -> str:
    """What a user reads of pydantic's error, which has the plugin's inside."""
    return str(error.errors()[0]["ctx"]["error"]) if hasattr(error, "errors") else str(error)


def load(folder: str, arguments: dict[str, Any]) -> list[Any]:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    model = arguments.pop("model", folder)
    try:
        config = EngineArgs(model=model, enforce_eager=True, **arguments).create_engine_config()
        assert config.model_config.quantization == "mxfp4_sm120", config.model_config.quantization
        with set_current_vllm_config(config):
            init_distributed_environment(1, 0, f"file://{folder}.rendezvous", 0, "gloo")
            initialize_model_parallel(1, 1)
            return [None, digests(get_model(vllm_config=config))]
    except Exception as error:
        return [line(error), None]
    finally:
        cleanup_dist_env_and_memory()
        gc.collect()


def register_loader() -> None:
    """A load format whose loader uses a tensor's memory again once it has been taken, as streams may."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class Reuses(DefaultModelLoader):
        def __init__(self, load_config: Any) -> None:
            super().__init__(replace(load_config, load_format="auto"))

        def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Any]]:
            for name, tensor in super().get_all_weights(model_config, model):
                yield name, tensor
                tensor.view(-1).view(tensor.dtype).fill_(1)

    register_model_loader("reuses_memory")(Reuses)


def main() -> None:
    import torch

    if not torch.accelerator.is_available():
        torch.accelerator.empty_cache = lambda: None  # as vLLM's worker for CPUs has it
    register_loader()
    collect_no_more()
    tasks = json.load(sys.stdin)
    Path(sys.argv[1]).write_text(json.dumps([load(folder, arguments) for folder, arguments in tasks]))


if __name__ == "__main__":
    main()
