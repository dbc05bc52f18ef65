# SPDX-License-Identifier: Apache-2.0
"""Attention's projections, lm_head and the embedding in INT8: loaded as BF16, encoded one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from vllm_mxfp4_sm120 import NAME, settings
from vllm_mxfp4_sm120.dense.int8 import BLOCK, Int8Weights
from vllm_mxfp4_sm120.quantization.reload import keeps_weight
from vllm_mxfp4_sm120.quantization.vllm_symbols import (
    LinearBase,
    QuantizeMethodBase,
    VllmConfig,
    get_current_vllm_config,
    logger,
    set_weight_attrs,
)

# The linear layers that read most bytes. The router stays BF16: it is small, and its error would choose other experts.
PROJECTIONS = ("qkv_proj", "o_proj")
# As vLLM's loaders ask for them: rows are outputs, columns inputs.
DIMENSIONS = {"input_dim": 1, "output_dim": 0}


@dataclass
class Report:
    """What became of a model's dense layers, said in one line when the last of them has been encoded."""

    waiting: int = 0
    before: int = 0
    after: int = 0
    errors: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, weight: Tensor, encoded: Int8Weights) -> None:
        """Nothing once it has been said: what a running engine loads anew isn't judged again."""
        if self.waiting:
            self.before += weight.nbytes
            self.after += encoded.bytes
            self.errors[name] = encoded.relative_error(weight)

    def one_done(self) -> None:
        if self.waiting:
            self.waiting -= 1
            if self.waiting == 0:
                logger.info("mxfp4_sm120: %s", self)

    def __str__(self) -> str:
        worst, error = max(((name, error.item()) for name, error in self.errors.items()), key=lambda one: one[1])
        return (
            f"{len(self.errors)} dense layers in INT8, {self.before / 2**20:.0f} MiB before, "
            f"{self.after / 2**20:.0f} MiB after; largest relative error {100 * error:.2f} %, of {worst}"
        )


class Int8Method(QuantizeMethodBase):
    """Of one layer: a projection, lm_head or the embedding."""

    def __init__(self, report: Report, model_config: Any = None) -> None:
        self.report, self.model_config = report, model_config

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        weight = torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype)
        parameter = Parameter(weight, requires_grad=False)
        set_weight_attrs(parameter, {**DIMENSIONS, **extra_weight_attrs})
        layer.register_parameter("weight", parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replace the loaded weight by its codes and scales, under the names that vLLM's own INT8 layers use."""
        if keeps_weight(layer, self.model_config):
            return
        weight = layer.weight
        encoded = getattr(weight, "encoded", None)  # by the other of two tied tables, which hold one parameter
        if encoded is None:
            encoded = weight.encoded = Int8Weights.quantize(weight.data)
            self.report.add(layer.prefix, weight.data, encoded)
        self.report.one_done()
        codes = Parameter(encoded.codes, requires_grad=False)
        set_weight_attrs(codes, {**DIMENSIONS, "weight_loader": _update(layer, weight.weight_loader)})
        layer.register_parameter("weight", codes)
        layer.register_parameter("weight_scale", Parameter(encoded.scales, requires_grad=False))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return int8_linear(x, layer.weight, layer.weight_scale, bias)

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        return Int8Weights(layer.weight, layer.weight_scale).decode(ids, layer.params_dtype)


def _update(layer: Any, load: Callable[..., None]) -> Callable[..., None]:
    """The loader of a layer that is served: a trainer's tensor, or a part of one, replaces what the layer holds.

    What isn't replaced stays as it is: decoded in FP32 and encoded again, codes are the same.
    """

    def load_encoded(param: Parameter, loaded_weight: Tensor, *args: Any, **kwargs: Any) -> None:
        held = Parameter(Int8Weights(param.data, layer.weight_scale.data).decode(), requires_grad=False)
        set_weight_attrs(held, DIMENSIONS)
        load(held, loaded_weight, *args, **kwargs)
        encoded = Int8Weights.quantize(held.data)
        param.data.copy_(encoded.codes)
        layer.weight_scale.data.copy_(encoded.scales)

    return load_encoded


# The wall before a compiled model: inside, which kernel answers depends on the number of tokens.
@torch.library.custom_op("mxfp4_sm120::int8_linear", mutates_args=())
def int8_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return Int8Weights(codes, scales).linear(x, bias)


@int8_linear.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


class Dense:
    """The INT8 layers of one model. `wanted`: its engine asks for them."""

    def __init__(self) -> None:
        self.report = Report()

    @property
    def wanted(self) -> bool:
        return wanted(get_current_vllm_config().additional_config)

    def method(self, layer: LinearBase, prefix: str) -> Int8Method | None:
        """None for a layer that stays BF16."""
        if not prefix.endswith(PROJECTIONS) or not self.wanted or _vllms_own(prefix):
            return None
        columns = getattr(layer, "input_size_per_partition", layer.input_size)
        return self._made() if _divides(columns, prefix) else None

    def take_vocabulary(self, *layers: Any) -> None:
        """lm_head and the embedding, which vLLM's GPT-OSS makes without asking for their method."""
        if not self.wanted:
            return
        for layer in layers:
            if _divides(layer.embedding_dim, layer.prefix):
                layer.quant_method = self._made()
                layer.use_fused_embedding = False  # vLLM's kernel reads BF16 rows

    def _made(self) -> Int8Method:
        self.report.waiting += 1
        return Int8Method(self.report, get_current_vllm_config().model_config)


def wanted(additional_config: object) -> bool:
    """Raises ValueError where --additional-config and the environment contradict each other."""
    return settings.DENSE.for_engine(settings.engine_options(additional_config)) == "int8"


def settle(vllm_config: VllmConfig) -> None:
    """Write what the environment says into the engine's configuration, which vLLM names compiled models by.

    Raises ValueError for what an engine can't be asked for beside INT8.
    """
    if not wanted(vllm_config.additional_config):
        return
    model, offload = vllm_config.model_config, vllm_config.offload_config
    if model.head_dtype != model.dtype:
        raise ValueError(f"dense int8 has no lm_head of dtype {model.head_dtype}; leave head_dtype or dense out")
    if offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0:
        raise ValueError("dense int8 and offloading to the CPU exclude each other; leave one of them out")
    options = settings.engine_options(vllm_config.additional_config)
    vllm_config.additional_config = {
        **vllm_config.additional_config,
        NAME: {**options, settings.DENSE.key: "int8"},
    }


def _divides(columns: int, name: str) -> bool:
    if columns % BLOCK:
        logger.warning_once(
            "mxfp4_sm120: %s stays BF16: its %d columns on this rank are no multiple of %d", name, columns, BLOCK
        )
    return columns % BLOCK == 0


def _vllms_own(prefix: str) -> bool:
    """Whether --quantization-config asks vLLM for its own kind of linear layers."""
    ours = getattr(get_current_vllm_config().model_config.quantization_config, "linear", None) is None
    if not ours:
        logger.warning_once("mxfp4_sm120: --quantization-config linear answers for %s, not dense int8", prefix)
    return not ours
