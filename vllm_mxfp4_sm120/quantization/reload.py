# SPDX-License-Identifier: Apache-2.0
"""Weights that change in a running engine. What is refused leaves an engine that answers, with its old weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm_mxfp4_sm120.quantization.vllm_symbols import (
    LAYERWISE_INFO,
    QKVParallelLinear,
    UnquantizedLinearMethod,
    finalize_layerwise_reload,
    get_current_vllm_config,
)


def is_checkpoint(weights: Any) -> bool:
    """Whether vLLM reads these from files (`reload_weights`): then they must be all. A trainer sends what it likes."""
    return getattr(getattr(weights, "gi_code", None), "co_name", None) == "get_all_weights"


def abandon(model_config: Any) -> None:
    """End vLLM's reload, if one is going on: layers that haven't been loaded whole get their old weights back.

    vLLM has put those aside, and until the reload ends such a layer holds none at all.
    """
    loading = [(layer, info) for layer, info in LAYERWISE_INFO.items() if info.can_load()]
    for _, info in loading:
        info.load_numel, info.loaded_weights = 0, []
    for layer, _ in loading:
        finalize_layerwise_reload(layer, model_config)


def drop_staged(layer: Any, names: Iterable[str]) -> bool:
    """Leave out of the old weights that vLLM keeps those parameters, which were there to load into only."""
    info = LAYERWISE_INFO.get(layer)
    old = {} if info is None or info.kernel_tensors is None else info.kernel_tensors[0]
    staged = [name for name in names if name in old]
    for name in staged:
        del old[name]
    return bool(staged)


def keeps_weight(layer: Any, model_config: Any) -> bool:
    """Whether a reload brings none of a linear layer's weight, which stays then; the bias may be new.

    Raises ValueError where it brings a part: the rest would be whatever memory held.
    """
    info = LAYERWISE_INFO.get(layer)
    if info is None or info.kernel_tensors is None:
        return False  # the first load, of which `checked` has seen every tensor
    came = {args.arguments.get("loaded_shard_id") for name, args in info.loaded_weights if name == "weight"}
    if not came:
        for name, tensor in info.kernel_tensors[0].items():
            if name.startswith("weight"):  # and the scales of an INT8 one
                layer.register_parameter(name, tensor)
    elif isinstance(layer, QKVParallelLinear) and (missing := set("qkv") - came):
        prefix = layer.prefix.replace(".attn.", ".self_attn.")
        names = ", ".join(prefix.replace("qkv_proj", f"{part}_proj.weight") for part in sorted(missing))
        abandon(model_config)
        raise ValueError(f"{names} missing, expected q, k and v together; reload all of the layer")
    return not came


class LinearMethod(UnquantizedLinearMethod):
    """vLLM's, with `keeps_weight`."""

    def __init__(self) -> None:
        super().__init__()
        self.model_config = get_current_vllm_config().model_config

    def process_weights_after_loading(self, layer: Any) -> None:
        if not keeps_weight(layer, self.model_config):
            super().process_weights_after_loading(layer)
