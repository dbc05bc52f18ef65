# SPDX-License-Identifier: Apache-2.0
"""vLLM's GPT-OSS, which takes only checkpoints that hold every tensor, once, as config.json says, from any source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from vllm_mxfp4_sm120.checkpoint import checked
from vllm_mxfp4_sm120.quantization import reload, router
from vllm_mxfp4_sm120.quantization.loader import PARAMETER_OF, PARAMETERS, PUBLISHED
from vllm_mxfp4_sm120.quantization.model_config import check
from vllm_mxfp4_sm120.quantization.vllm_symbols import (
    GptOssForCausalLM,
    RoutedExperts,
    VllmConfig,
    WeightsMapper,
    default_weight_loader,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    logger,
)


class AdapterNames(WeightsMapper):
    """Renames an adapter's tensors as vLLM's does, and refuses experts', which vLLM would drop without a word."""

    def _map_name_with_shard(self, key: str) -> Any:
        if ".experts" in key:
            raise ValueError(
                f"the adapter holds {key}, and packed experts take no adapter; train it without experts, or merge it "
                "into the checkpoint"
            )
        return super()._map_name_with_shard(key)


class Names(WeightsMapper):
    """vLLM's table of names for loading, and `AdapterNames` for adapters."""

    def get_rename_mapper(self) -> AdapterNames:
        return AdapterNames(**vars(super().get_rename_mapper()))


class Mxfp4Sm120ForCausalLM(GptOssForCausalLM):
    """`complete`: a whole checkpoint has been loaded, and what comes now are updates of a part or of all."""

    hf_to_vllm_mapper = Names(**vars(GptOssForCausalLM.hf_to_vllm_mapper))

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        router.register()
        vllm_config.quant_config.dense.prove(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        vllm_config.quant_config.dense.take_vocabulary(self.model.embedding, self.lm_head)
        self.complete = vllm_config.load_config.load_format == "dummy"

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ValueError: vLLM would save (`save_sharded_state`) a backend's own layout, which nothing loads."""
        raise ValueError(
            f"{self.vllm_config.model_config.model}: a model whose experts lie in a backend's own layout can't be "
            "saved; copy the checkpoint that it was loaded from"
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint, or in a running engine any part of one.

        Raises ValueError, naming the tensor. Nothing of a list that holds a wrong tensor is loaded, nor of a folder
        whose headers are wrong; from any other source what came before the wrong tensor is.
        """
        model = self.vllm_config.model_config
        whole = not self.complete or reload.is_checkpoint(weights)
        try:
            if self.complete and whole:
                check(self.vllm_config)
            named = checked(weights, self.config.to_dict(), model.model, whole=whole, at_once=self.complete)
            experts = _Experts(self)
            loaded = super().load_weights(experts.take(list(named) if isinstance(weights, list | tuple) else named))
        except ValueError:
            reload.abandon(model)
            raise
        experts.finish()
        self.complete = True
        return loaded | experts.loaded


class _Experts:
    """The experts' tensors, and the sinks, out of all that come, each cut to what this rank holds."""

    def __init__(self, model: Mxfp4Sm120ForCausalLM) -> None:
        modules = [(name, module) for name, module in model.named_modules() if isinstance(module, RoutedExperts)]
        self.layers: dict[str, tuple[str, Any]] = {module.layer_name: (name, module) for name, module in modules}
        for _, layer in modules:
            # What a trainer left unfinished is no part of the old weights.
            if reload.drop_staged(layer, PARAMETERS):
                layer.quant_method.loader.loaded = set()
        self.parameters = dict(model.named_parameters())
        self.loaded: set[str] = set()

    def take(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Load experts and sinks, and yield everything else."""
        for name, tensor in named:
            prefix, _, kind = name.rpartition(".")
            if kind == "sinks":
                self._load_sinks(prefix, tensor)
            elif kind not in PUBLISHED:
                yield name, tensor
            elif prefix in self.layers:  # else another pipeline stage has that layer
                self._load(*self.layers[prefix], PUBLISHED[kind], tensor)

    def _load_sinks(self, prefix: str, tensor: Tensor) -> None:
        """By a parameter's own loader, if it has one: vLLM's GPT-OSS copies, which a reload doesn't see."""
        name = prefix.replace(".self_attn", ".attn") + ".sinks"
        if (sinks := self.parameters.get(name)) is None:
            return
        part = tensor.chunk(get_tensor_model_parallel_world_size())[get_tensor_model_parallel_rank()]
        getattr(sinks, "weight_loader", default_weight_loader)(sinks, part)
        self.loaded.add(name)

    def _load(self, name: str, layer: Any, field: str, tensor: Tensor) -> None:
        method, parameter = layer.quant_method, PARAMETER_OF[field]
        # In a running engine, vLLM gives a layer these parameters again before it reloads it, and calls
        # `process_weights_after_loading` when they are full. A trainer that calls load_weights itself hasn't asked for
        # that: then it is done here, and the old weights answer as long.
        if not hasattr(layer, parameter):
            method.stage(layer, next(iter(method.prepared.values())).device)
        target = getattr(layer, parameter)
        target.weight_loader(target, method.loader.shard.part(field, tensor), weight_name=parameter)
        self.loaded.add(f"{name}.{parameter}")
        if method.prepared and method.loader.complete:
            method.process_weights_after_loading(layer)

    def finish(self) -> None:
        methods = [layer.quant_method for _, layer in self.layers.values()]
        if any(method.prepared and method.loader.loaded for method in methods):
            logger.warning_once(
                "mxfp4_sm120: a layer's new experts answer once all %d tensors have come, the old ones until then",
                len(PUBLISHED),
            )
