"""The plugin's parts inside vLLM, without an engine."""

from __future__ import annotations

import logging
import pickle
from types import SimpleNamespace

import pytest
import torch
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.quantization import get_quantization_config

from vllm_mxfp4_sm120 import plugin
from vllm_mxfp4_sm120.backends.tiled import Tiled
from vllm_mxfp4_sm120.moe import MoEShape
from vllm_mxfp4_sm120.quantization import config as quantization_config
from vllm_mxfp4_sm120.quantization import fused_moe
from vllm_mxfp4_sm120.quantization import router as quantization_router
from vllm_mxfp4_sm120.quantization.config import Mxfp4Sm120Config
from vllm_mxfp4_sm120.quantization.router import RouterMethod

SHAPE = MoEShape(num_experts=16, local_experts=16, hidden_size=192, intermediate_size=160, top_k=4)


class Capturable(Tiled):
    capturable = True


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the plugin logs; vLLM's logger has handlers of its own and hides it from pytest."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(logging.getLogger("vllm.mxfp4_sm120"), "handlers", [handler])
    return lines


def test_register_twice() -> None:
    plugin.register()
    plugin.register()
    assert get_quantization_config("mxfp4_sm120") is Mxfp4Sm120Config


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.33.1", "0.33.0rc1", "0.33.2.dev7+gabc"])
def test_supported_engines(version: str, said: list[str]) -> None:
    plugin.warn_if_unsupported(version)
    assert said == []


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0"])
def test_other_engines_are_named(version: str, said: list[str]) -> None:
    plugin.warn_if_unsupported(version)
    assert said == [f"mxfp4_sm120 supports vLLM >= 0.32, < 0.34; this is vLLM {version}"]


def test_config_reaches_workers() -> None:
    config = pickle.loads(pickle.dumps(Mxfp4Sm120Config.from_config({"quant_method": "mxfp4"})))
    assert config.checkpoint == {"quant_method": "mxfp4"}
    assert config.get_name() == "mxfp4_sm120"


def test_graphs_are_off_for_what_cannot_be_captured(said: list[str]) -> None:
    config = VllmConfig()
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    with set_current_vllm_config(config):
        fused_moe.never_capture_unless(Capturable(SHAPE))
        assert config.compilation_config.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE
        for _ in range(3):  # once per layer
            fused_moe.never_capture_unless(Tiled(SHAPE))
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE
    assert said == ["mxfp4_sm120: CUDA graphs are off, because the tiled backend can't be captured in one"]


@pytest.mark.parametrize(
    ("family", "asked", "model", "quant", "auto", "claimed"),
    [
        (120, None, "gpt_oss", "mxfp4", "1", True),
        (120, None, "gpt_oss", "gpt_oss_mxfp4", "1", True),
        (120, None, "gpt_oss", "mxfp4", "0", False),
        (120, None, "gpt_oss", "fp8", "1", False),
        (120, None, "llama", "mxfp4", "1", False),
        (120, "mxfp4", "gpt_oss", "mxfp4", "1", False),
        (120, "gpt_oss_mxfp4", "gpt_oss", "mxfp4", "1", False),
        (90, None, "gpt_oss", "mxfp4", "1", False),
        (0, None, "gpt_oss", "mxfp4", "1", False),
        (90, "mxfp4_sm120", "gpt_oss", "mxfp4", "1", True),
        (120, "mxfp4_sm120", "gpt_oss", "mxfp4", "0", True),
    ],
)
def test_what_is_claimed(
    monkeypatch: pytest.MonkeyPatch,
    family: int,
    asked: str | None,
    model: str,
    quant: str,
    auto: str,
    claimed: bool,
) -> None:
    class Platform:
        @staticmethod
        def is_device_capability_family(wanted: int) -> bool:
            return wanted == family

    class HfConfig:
        model_type = model

    monkeypatch.setattr(quantization_config, "current_platform", Platform)
    monkeypatch.setenv("MXFP4_SM120_AUTO", auto)
    answer = Mxfp4Sm120Config.override_quantization_method({"quant_method": quant}, asked, HfConfig)
    assert answer == ("mxfp4_sm120" if claimed else None)


@pytest.mark.parametrize(("given", "kept"), [(2880, 2880), (1440, 1440), (720, 736), (360, 384)])
def test_only_whole_blocks_no_padding(given: int, kept: int) -> None:
    method = fused_moe.Mxfp4Sm120MoEMethod.__new__(fused_moe.Mxfp4Sm120MoEMethod)
    assert method.maybe_roundup_sizes(2880, given, torch.bfloat16, None) == (2880, kept)  # type: ignore[arg-type]


class OneLayer(RoutedExperts):
    """Of RoutedExperts only what the loader asks for."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)


@pytest.mark.parametrize(
    "loaded",
    [torch.zeros(2, 4, 5, dtype=torch.uint8), torch.zeros(2, 4, 3), torch.zeros(2, 5, 3, dtype=torch.uint8)],
    ids=["too wide", "float", "too many rows"],
)
def test_loader_refuses_what_does_not_fit(loaded: torch.Tensor) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, 4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError) as caught:
        fused_moe.Loader(OneLayer())(parameter, loaded, "model.layers.0.mlp.experts.w2_weight", None, None)
    assert str(caught.value) == (
        f"model.layers.0.mlp.experts.w2_weight: got {loaded.dtype} {list(loaded.shape)} for this rank, expected "
        "at most torch.uint8 [2, 4, 4]; the checkpoint does not match its config.json, fetch it again"
    )


def test_loader_leaves_the_rest_of_a_short_shard_zero() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, 4, 4, dtype=torch.uint8), requires_grad=False)
    fused_moe.Loader(OneLayer())(parameter, torch.ones(2, 4, 3, dtype=torch.uint8), "w2_weight", None, None)
    assert parameter.sum() == 2 * 4 * 3
    assert not parameter[..., 3].any()


class Routes(Tiled):
    has_router = True

    def router_logits(self, x, weight, bias):
        return super().router_logits(x, weight, bias) + 1


def random_router(config: VllmConfig, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> GateLinear:
    """The router of layer 1, as vLLM makes it with the plugin there."""
    monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(rank_in_group=0, world_size=1))
    plugin.register()
    with set_current_vllm_config(config):
        router = GateLinear(64, 8, bias=True, prefix="model.layers.1.mlp.router", return_bias=False, params_dtype=dtype)
    torch.nn.init.normal_(router.weight.data)
    torch.nn.init.normal_(router.bias.data)
    return router


@pytest.mark.parametrize("backend", [Routes, Tiled])
@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_router_is_the_experts_backends_where_it_has_one(
    backend: type, ours: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = VllmConfig()
    config.quant_config = Mxfp4Sm120Config({}) if ours else None
    router = random_router(config, dtype, monkeypatch)
    assert isinstance(router.quant_method, RouterMethod) == ours
    method = SimpleNamespace(backend=backend(SHAPE))
    experts = SimpleNamespace(routed_experts=SimpleNamespace(quant_method=method))
    config.compilation_config.static_forward_context["model.layers.1.mlp.experts"] = experts
    x = torch.randn(3, 64, dtype=dtype)
    plain = torch.nn.functional.linear(x, router.weight, router.bias)
    router.quant_method.process_weights_after_loading(router)
    fused = ours and backend is Routes and dtype == torch.bfloat16
    torch.testing.assert_close(router(x), plain + 1 if fused else plain)


def test_a_compiled_model_asks_the_backend_of_the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM keeps compiled models; what they hold must not depend on which backend was there when they were made."""
    config = VllmConfig()
    config.quant_config = Mxfp4Sm120Config({})
    layers = config.compilation_config.static_forward_context
    monkeypatch.setattr(quantization_router, "get_forward_context", lambda: SimpleNamespace(no_compile_layers=layers))
    router = random_router(config, torch.bfloat16, monkeypatch)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    plain = torch.nn.functional.linear(x, router.weight, router.bias)
    router.quant_method.process_weights_after_loading(router)
    compiled = torch.compile(router.forward, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain)
    another = SimpleNamespace(router_logits=lambda x, weight, bias: plain + 1)  # vLLM may have dropped the weights
    router.quant_method.backend = another
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(x), plain + 1)


@pytest.mark.parametrize(
    ("method", "changed", "routes"),
    [
        (RoutingMethodType.Renormalize, False, True),
        (RoutingMethodType.Renormalize, True, False),
        (RoutingMethodType.TopK, False, False),
    ],
)
def test_who_routes(method: RoutingMethodType, changed: bool, routes: bool) -> None:
    """The backend, unless the routing isn't GPT-OSS's, or vLLM says that it changes routes after routing."""
    moe = SimpleNamespace(routing_method=method, require_decomposed_backend=changed)
    with set_current_vllm_config(VllmConfig()):
        assert fused_moe.Mxfp4Sm120MoEMethod(moe).is_monolithic is routes  # type: ignore[arg-type]
