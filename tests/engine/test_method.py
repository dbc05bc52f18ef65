# SPDX-License-Identifier: Apache-2.0
"""The plugin's parts inside vLLM, without an engine."""

from __future__ import annotations

import itertools
import logging
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.quantization import get_quantization_config

from vllm_mxfp4_sm120 import plugin, selector
from vllm_mxfp4_sm120.backends.native import Native, fp4, library
from vllm_mxfp4_sm120.backends.tiled import Tiled
from vllm_mxfp4_sm120.fp4.plan import BF16, Plan
from vllm_mxfp4_sm120.moe import MoEShape, MoEWeights
from vllm_mxfp4_sm120.platform import Machine
from vllm_mxfp4_sm120.quantization import config as quantization_config
from vllm_mxfp4_sm120.quantization import fused_moe
from vllm_mxfp4_sm120.quantization import router as quantization_router
from vllm_mxfp4_sm120.quantization.config import Mxfp4Sm120Config
from vllm_mxfp4_sm120.quantization.loader import Loader, Shard, parameters
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
def test_supported_engines(version: str) -> None:
    assert plugin.why_unsupported(version) is None


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0", "dev", "", "0.1.dev1+gabc"])
def test_other_engines_are_not_touched(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MXFP4_SM120_ANY_VLLM", raising=False)
    assert plugin.why_unsupported(version) == (
        "it was written for vLLM >= 0.32, < 0.34; MXFP4_SM120_ANY_VLLM=1 tries any other"
    )
    monkeypatch.setenv("MXFP4_SM120_ANY_VLLM", "1")
    assert plugin.why_unsupported(version) is None


def test_config_reaches_workers() -> None:
    config = pickle.loads(pickle.dumps(Mxfp4Sm120Config.from_config({"quant_method": "mxfp4"})))
    assert config.checkpoint == {"quant_method": "mxfp4"}
    assert config.get_name() == "mxfp4_sm120"


FOUR = Plan(None, 4, ((511, BF16), (math.inf, "terms4_tokens128")))


@pytest.mark.parametrize(
    ("backend", "capability", "plan", "line"),
    [
        (Native, (12, 0), FOUR, "4 FP4 terms from 512 tokens on, else BF16"),
        (Native, (12, 1), Plan("no kernels"), "BF16 (no kernels)"),
        (Native, (9, 0), FOUR, "4 FP4 terms from 512 tokens on, else BF16"),
        (Native, (9, 0), Plan("no kernels"), None),
        (Tiled, (12, 0), Plan("no kernels"), None),
    ],
)
def test_the_log_says_what_activations_are(
    monkeypatch: pytest.MonkeyPatch, backend: type, capability: tuple, plan: Plan, line: str | None
) -> None:
    """Where there is something to say, and the layer does what is said."""
    lines: list[str] = []
    monkeypatch.setattr(fused_moe.logger, "info_once", lambda text, *given: lines.append(text % given))
    monkeypatch.setattr(library, "load", lambda: "120f-real")
    monkeypatch.setattr(fp4, "configurations", lambda: (fp4.Configuration("terms4_tokens128", 4, 128, 256, 1),))
    method = object.__new__(fused_moe.Mxfp4Sm120MoEMethod)
    method.shape, method.compilation_config = SHAPE, SimpleNamespace(cudagraph_mode=None)
    method.choose(selector.Choice(backend, "default", Machine(capability, (13, 0), "card"), activations=plan))
    experts, *activations = lines
    assert experts.startswith("mxfp4_sm120: MXFP4 experts on card")
    assert activations == ([] if line is None else [f"mxfp4_sm120: activations of the experts: {line}"])
    assert getattr(method.backend, "fp4_kernels", ()) == (((511, None), (math.inf, 0)) if plan is FOUR else ())


@pytest.mark.parametrize("backend", [Native, Tiled])
def test_batches_that_must_not_change_an_answer(
    monkeypatch: pytest.MonkeyPatch, said: list[str], backend: type
) -> None:
    """One kernel for all numbers of tokens, no FP4 kernel among them; who can't say that of itself says so."""
    monkeypatch.setattr(library, "load", lambda: "120f-real")
    table = [library.Configuration(name, 8192, 7168, 1, 1, 1) for name in ("decode", "tokens64", "tokens80")]
    monkeypatch.setattr(library, "configurations", lambda: table)
    monkeypatch.setattr(fp4, "configurations", lambda: (fp4.Configuration("terms4_tokens128", 4, 128, 256, 1),))
    method = object.__new__(fused_moe.Mxfp4Sm120MoEMethod)
    method.shape, method.compilation_config = SHAPE, SimpleNamespace(cudagraph_mode=None)
    card = Machine((12, 0), (13, 0), "card")
    method.choose(selector.Choice(backend, "default", card, activations=FOUR, batch_invariant=True))
    if backend is Native:
        assert method.backend.configuration == 1
        assert {method.backend.fp4_kernel(tokens) for tokens in (1, 511, 512, 8192)} == {None}
    else:
        [line] = [line for line in said if "BATCH_INVARIANT" in line]
        assert line.endswith("and the tiled backend's answers may depend on the number of tokens")


def test_graphs_are_off_for_what_cannot_be_captured(said: list[str]) -> None:
    config = VllmConfig()
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    with set_current_vllm_config(config):
        fused_moe.never_capture_unless(Capturable(SHAPE), config.compilation_config)
        assert config.compilation_config.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE
        for _ in range(3):  # once per layer
            fused_moe.never_capture_unless(Tiled(SHAPE), config.compilation_config)
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


# A rank's part of a layer: experts 4 and 5 of 16, and of 160 columns the last 64, in room for 96.
PART = MoEShape(num_experts=16, local_experts=2, hidden_size=64, intermediate_size=96, top_k=4)
SHARD = Shard(experts=(4, 5), start=96, stop=160)


def staged() -> tuple[Loader, dict[str, torch.nn.Parameter]]:
    """Parameters in memory that held something else before."""
    loader = Loader("model.layers.0.mlp.experts", PART, SHARD)
    made = parameters(MoEWeights.empty(PART, "cpu"), loader)
    for parameter in made.values():
        parameter.data.fill_(7)
    return loader, made


@pytest.mark.parametrize(
    "loaded",
    [
        torch.zeros(2, 64, 33, dtype=torch.uint8),
        torch.zeros(2, 64, 31, dtype=torch.uint8),
        torch.zeros(2, 64, 32),
        torch.zeros(2, 65, 32, dtype=torch.uint8),
        torch.zeros(1, 64, 32, dtype=torch.uint8),
        torch.zeros(3, 64, 32, dtype=torch.uint8),
    ],
    ids=["too wide", "too narrow", "float", "too many rows", "an expert less", "an expert more"],
)
def test_loader_takes_only_what_is_exactly_right(loaded: torch.Tensor) -> None:
    _, made = staged()
    with pytest.raises(ValueError) as caught:
        made["w2_weight"].weight_loader(made["w2_weight"], loaded, "w2_weight", None, None)
    assert str(caught.value) == (
        f"model.layers.0.mlp.experts w2_weight: got {loaded.dtype} {list(loaded.shape)} for this rank, expected "
        "torch.uint8 [2, 64, 32]; the checkpoint does not match its config.json"
    )
    assert made["w2_weight"].eq(7).all()


def test_loader_leaves_the_rest_of_a_short_shard_zero() -> None:
    loader, made = staged()
    whole = torch.arange(16 * 64 * 5 * 16, dtype=torch.int32).view(16, 64, 5, 16).to(torch.uint8)
    made["w2_weight"].weight_loader(made["w2_weight"], loader.shard.part("w2", whole), "w2_weight")
    assert torch.equal(made["w2_weight"][..., :32], whole[4:6, :, 3:].flatten(2))
    assert not made["w2_weight"][..., 32:].any()
    assert made["w2_weight"].weight_loader_numel == 2 * 64 * 32


def test_loader_wants_every_tensor_once() -> None:
    loader, made = staged()
    part = loader.shard.part("w2_bias", torch.ones(16, 64, dtype=torch.bfloat16))
    assert not part.any()  # only the first rank adds it
    made["w2_bias"].weight_loader(made["w2_bias"], part)
    with pytest.raises(ValueError, match="loaded twice"):
        made["w2_bias"].weight_loader(made["w2_bias"], part)
    with pytest.raises(ValueError, match=r"gate_up_proj_blocks, gate_up_proj_scales, .*down_proj_scales not loaded"):
        loader.finish()


@pytest.mark.parametrize(
    ("expert_map", "experts"),
    [(None, tuple(range(5))), ([-1, -1, -1, 0, 1], (3, 4)), ([1, -1, 0, -1, 2], (2, 0, 4)), ([-1] * 5, ())],
)
def test_any_placement_of_experts(expert_map: list[int] | None, experts: tuple[int, ...]) -> None:
    placed = None if expert_map is None else torch.tensor(expert_map)
    shard = Shard.of(placed, 5, 160, 160, 0)
    assert (shard.experts, shard.start, shard.stop) == (experts, 0, 160)
    tensor = torch.arange(10).view(5, 2)
    assert torch.equal(shard.part("w2_bias", tensor), tensor[list(experts)])


@pytest.mark.parametrize(("rank", "columns"), [(0, (0, 64)), (1, (64, 128)), (2, (128, 160)), (3, (160, 160))])
def test_more_ranks_than_blocks(rank: int, columns: tuple[int, int]) -> None:
    shard = Shard.of(None, 5, 160, 64, rank)
    assert (shard.start, shard.stop) == columns


class Routes(Tiled):
    has_router = True

    def router_logits(self, x, weight, bias):
        return super().router_logits(x, weight, bias) + 1


def random_router(config: VllmConfig, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> GateLinear:
    """The router of layer 1, as vLLM makes it with the plugin there."""
    monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(rank_in_group=0, world_size=1))
    quantization_router.register()
    with set_current_vllm_config(config):
        router = GateLinear(64, 8, bias=True, prefix="model.layers.1.mlp.router", return_bias=False, params_dtype=dtype)
    torch.nn.init.normal_(router.weight.data)
    torch.nn.init.normal_(router.bias.data)
    return router


@pytest.mark.parametrize(
    ("backend", "ours", "dtype", "invariant"),
    [
        *itertools.product((Routes, Tiled), (True, False), (torch.bfloat16, torch.float32), (False,)),
        (Routes, True, torch.bfloat16, True),
    ],
)
def test_the_router_is_the_experts_backends_where_it_has_one(
    backend: type, ours: bool, dtype: torch.dtype, invariant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for batches that must not change an answer: its kernel is for few tokens."""
    monkeypatch.setattr(quantization_router, "envs", SimpleNamespace(VLLM_BATCH_INVARIANT=invariant))
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
    fused = ours and backend is Routes and dtype == torch.bfloat16 and not invariant
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
