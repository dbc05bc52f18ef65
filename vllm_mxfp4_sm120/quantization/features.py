# SPDX-License-Identifier: Apache-2.0
"""What an engine can be asked for that vLLM's own MXFP4 experts can do, and these can't, each with the way out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_mxfp4_sm120.backends import registry
from vllm_mxfp4_sm120.quantization.vllm_symbols import VllmConfig

GPT_OSS = "GptOssForCausalLM"
# The parameters that hold experts, by the parts of their names that --cpu-offload-params is compared with.
EXPERT_NAMES = ("mlp", "experts", "routed_experts")
PARAMETERS = tuple(f"w{projection}_{kind}" for projection in (13, 2) for kind in ("weight", "weight_scale", "bias"))
# Of a model that has been loaded: its experts are in a backend's own layout, which another backend can't read.
PREPARED_FORMATS = ("sharded_state", "runai_streamer_sharded", "ipc_cache")

# vLLM's loaders that don't call the experts' `process_weights_after_loading`, or belong to another package.
UNPREPARED_FORMATS = ("tensorizer", "modelexpress")


@dataclass(frozen=True)
class Feature:
    """`wanted` says whether the engine asks for it; `refusal` is what can't be done, and the way out."""

    wanted: Callable[[VllmConfig], bool]
    refusal: str


def _lora_on_experts(config: VllmConfig) -> bool:
    lora = config.lora_config
    return lora is not None and (lora.target_modules is None or any("expert" in name for name in lora.target_modules))


def _experts_offloaded(config: VllmConfig) -> bool:
    offload = config.offload_config
    asked = []
    if offload.uva.cpu_offload_gb > 0:
        asked.append(offload.uva.cpu_offload_params)
    if offload.prefetch.offload_group_size > 0:
        asked.append(offload.prefetch.offload_params)
    ours = {*EXPERT_NAMES, *PARAMETERS}
    return any(not names or any(ours & set(name.split(".")) for name in names) for names in asked)


def _between_ranks(config: VllmConfig) -> bool:
    parallel = config.parallel_config
    return parallel.enable_expert_parallel and parallel.all2all_backend != "allgather_reducescatter"


FEATURES = (
    Feature(
        lambda config: list(config.model_config.architectures) != [GPT_OSS],
        f"its architecture isn't {GPT_OSS} alone, the only one that this plugin serves",
    ),
    Feature(
        lambda config: config.model_config.runner_type == "pooling",
        "it is to run as a pooling model, and this plugin serves text generation only",
    ),
    Feature(
        _lora_on_experts,
        "--enable-lora would reach the experts, which stay packed; --lora-target-modules qkv_proj o_proj leaves "
        "them out",
    ),
    Feature(
        lambda config: config.parallel_config.enable_eplb,
        "--enable-eplb moves experts between ranks, which packed ones can't; leave it out",
    ),
    Feature(
        _between_ranks,
        "with expert parallelism only --all2all-backend allgather_reducescatter is served",
    ),
    Feature(
        lambda config: config.load_config.load_format in PREPARED_FORMATS,
        f"a --load-format of {', '.join(PREPARED_FORMATS)} holds experts in one backend's own layout; "
        "load the published checkpoint",
    ),
    Feature(
        lambda config: config.load_config.load_format in UNPREPARED_FORMATS,
        f"a --load-format of {', '.join(UNPREPARED_FORMATS)} loads experts without handing them to a backend; "
        "load the published checkpoint",
    ),
    Feature(
        _experts_offloaded,
        "the experts can't be offloaded to the CPU; --cpu-offload-params self_attn leaves them where they are",
    ),
    Feature(
        lambda config: getattr(config.model_config.quantization_config, "moe", None) is not None,
        "--quantization-config moe asks for other experts than the checkpoint's with BF16 activations; leave it out",
    ),
    Feature(
        lambda config: config.model_config.dtype != torch.bfloat16,
        "only --dtype bfloat16 is served",
    ),
)


def why_not(config: VllmConfig) -> str | None:
    """One line: the first feature that this engine asks for and the plugin lacks. None if there is none."""
    backend = config.kernel_config.moe_backend
    if backend not in ("auto", *registry.MOE_BACKENDS):
        return f"--moe-backend {backend} is vLLM's own; this plugin has {', '.join(registry.MOE_BACKENDS)}"
    return next((feature.refusal for feature in FEATURES if feature.wanted(config)), None)
