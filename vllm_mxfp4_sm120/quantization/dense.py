# SPDX-License-Identifier: Apache-2.0
"""Attention's projections, lm_head and the embedding: which method each has, and their INT8 method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from vllm_mxfp4_sm120 import NAME, selector, settings
from vllm_mxfp4_sm120.dense import plan
from vllm_mxfp4_sm120.dense.int8 import Int8Weights
from vllm_mxfp4_sm120.dense.linear import LinearShape, is_served, linear
from vllm_mxfp4_sm120.platform import Machine
from vllm_mxfp4_sm120.quantization.dense_bf16 import Bf16Method, Bf16Vocabulary
from vllm_mxfp4_sm120.quantization.reload import keeps_weight
from vllm_mxfp4_sm120.quantization.vllm_symbols import (
    QuantizeMethodBase,
    VllmConfig,
    envs,
    get_current_vllm_config,
    get_tensor_model_parallel_world_size,
    logger,
    set_weight_attrs,
)

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
        """Replace the loaded weight by its codes and scales, under the names that vLLM's own INT8 layers use.

        Trainers call this for a whole engine: what is encoded stays as it is.
        """
        if keeps_weight(layer, self.model_config) or layer.weight.dtype == torch.int8:
            return
        weight = layer.weight
        encoded = getattr(weight, "encoded", None)  # by the other of two tied tables, which hold one parameter
        if encoded is None:
            if weight.is_cuda:
                # Or the codes would take part of a block that another layer's BF16 weight has left, and the allocator
                # keep the rest of it: half a GiB between lm_head and the embedding.
                torch.cuda.empty_cache()
            encoded = weight.encoded = Int8Weights.quantize(weight.data)
            self.report.add(layer.prefix or "the embedding", weight.data, encoded)  # which vLLM gives no name
        self.report.one_done()
        codes = Parameter(encoded.codes, requires_grad=False)
        set_weight_attrs(codes, {**DIMENSIONS, "weight_loader": _update(layer, weight.weight_loader)})
        layer.register_parameter("weight", codes)
        layer.register_parameter("weight_scale", Parameter(encoded.scales, requires_grad=False))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = linear(x, layer.weight, layer.weight_scale, bias)
        return out

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        return Int8Weights(layer.weight, layer.weight_scale).decode(ids, layer.params_dtype)


def _update(layer: Any, load: Callable[..., None]) -> Callable[..., None]:
    """The loader of a layer that is served: a trainer's tensor, or a part of one, replaces what the layer holds.

    What isn't replaced stays as it is. Meanwhile the layer is there in BF16 once more.
    """

    def load_encoded(param: Parameter, loaded_weight: Tensor, *args: Any, **kwargs: Any) -> None:
        encoded = Int8Weights(param.data, layer.weight_scale.data)
        held = Parameter(encoded.decode(dtype=layer.params_dtype), requires_grad=False)
        set_weight_attrs(held, DIMENSIONS)
        load(held, loaded_weight, *args, **kwargs)
        encoded.update(held.data)

    return load_encoded


class Dense:
    """These layers of one model, in one process.

    `kind` is what serves them, off, bf16 or int8, and `shapes` are this rank's of those that aren't left to vLLM: both
    from `prove` on.
    """

    def __init__(self) -> None:
        self.report = Report()
        self.kind = "off"
        self.shapes: dict[str, LinearShape] = {}

    def prove(self, vllm_config: VllmConfig) -> None:
        """Before a layer is made and takes memory: which linear answers at how many tokens, for this process.

        `bf16` is vLLM's own model, also by its name among compiled ones, where no kernel of ours answers at any size.
        """
        options = settings.engine_options(vllm_config.additional_config)
        kind, said = settings.DENSE.for_engine(options), settings.DENSE.is_said(options)
        if kind == "off":
            return
        machine = selector.this_machine()
        reason = why_vllms_own(vllm_config) if kind == "bf16" else None
        if reason is None and not said:
            reason = plan.why_not(machine)
        if reason is not None:
            (logger.warning_once if said else logger.debug_once)("mxfp4_sm120: %s, not dense %s", reason, kind)
        else:
            self._make(vllm_config, kind, machine)
        if said or self.kind != "off":
            _write(vllm_config, self.kind)

    def _make(self, vllm_config: VllmConfig, kind: str, machine: Machine) -> None:
        shapes = _shapes(vllm_config, kind)
        if envs.VLLM_BATCH_INVARIANT:
            made = plan.Plan(selector.ONE_FOR_ALL)
        else:
            options = settings.engine_options(vllm_config.additional_config)
            made = plan.make(shapes, machine, settings.PROOF.for_engine(options))
        made.serve()
        for name, shape in shapes.items():
            logger.info_once("mxfp4_sm120: %s %s by %s", name, shape, made.text(shape))
        if kind == "int8" or any(is_served(shape.rows, shape.columns, shape.int8) for shape in shapes.values()):
            self.kind, self.shapes = kind, shapes

    def method(self, prefix: str) -> QuantizeMethodBase | None:
        """None for a layer that vLLM's own linear computes."""
        shape = self.shapes.get(prefix.rpartition(".")[2])
        if shape is None or (self.kind == "int8" and not shape.int8):
            return None
        return self._made() if shape.int8 else Bf16Method()

    def take_vocabulary(self, embedding: Any, lm_head: Any) -> None:
        """What vLLM's GPT-OSS makes without asking for a method. A hidden size is whole blocks of 32."""
        if self.kind == "bf16" and "lm_head" in self.shapes:
            lm_head.quant_method = Bf16Vocabulary(lm_head)
        elif self.kind == "int8":
            for layer in (embedding, lm_head):
                layer.quant_method = self._made()
                layer.use_fused_embedding = False  # vLLM's kernel reads BF16 rows

    def _made(self) -> Int8Method:
        self.report.waiting += 1
        return Int8Method(self.report, get_current_vllm_config().model_config)


def _shapes(config: VllmConfig, kind: str) -> dict[str, LinearShape]:
    """This rank's, without the layers that the engine leaves to vLLM."""
    model = config.model_config
    shapes = plan.shapes(model.hf_config.to_dict(), get_tensor_model_parallel_world_size(), kind == "int8")
    if model.head_dtype != model.dtype:
        del shapes["lm_head"]
    if (reason := _other_quantization(config)) is not None:
        logger.warning_once("mxfp4_sm120: %s, not dense %s", reason, kind)
        return {name: shape for name, shape in shapes.items() if name == "lm_head"}
    return shapes


def settle(vllm_config: VllmConfig) -> None:
    """Write what the environment says into the engine's configuration; the default is settled by `Dense.prove`.

    Raises ValueError where --additional-config and the environment contradict each other, and for what an engine can't
    be asked for beside INT8.
    """
    options, model = settings.engine_options(vllm_config.additional_config), vllm_config.model_config
    kind = settings.DENSE.for_engine(options)
    if kind == "int8" and model.head_dtype != model.dtype:
        raise ValueError(f"dense int8 has no lm_head of dtype {model.head_dtype}; leave head_dtype or dense out")
    if kind == "int8" and _offloads(vllm_config):
        raise ValueError("dense int8 and offloading to the CPU exclude each other; leave one of them out")
    if settings.DENSE.is_said(options):
        _write(vllm_config, kind)


def _write(vllm_config: VllmConfig, kind: str) -> None:
    """Into the engine's configuration, which vLLM names compiled models by."""
    options = settings.engine_options(vllm_config.additional_config)
    vllm_config.additional_config = {**vllm_config.additional_config, NAME: {**options, settings.DENSE.key: kind}}


def why_vllms_own(config: VllmConfig) -> str | None:
    """One line: what an engine asks of its BF16 linear layers that only vLLM's own do. None if nothing."""
    if envs.VLLM_BATCH_INVARIANT:
        return "VLLM_BATCH_INVARIANT=1 wants vLLM's own linear layers"
    if config.kernel_config.linear_backend != "auto":
        return f"--linear-backend {config.kernel_config.linear_backend} answers"
    return "offloading to the CPU wants vLLM's own linear layers" if _offloads(config) else None


def _other_quantization(config: VllmConfig) -> str | None:
    asked = config.model_config.quantization_config
    if getattr(asked, "linear", None) is None and getattr(asked, "targets", None) is None:
        return None
    return "--quantization-config answers for qkv_proj and o_proj"


def _offloads(config: VllmConfig) -> bool:
    offload = config.offload_config
    return offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0
