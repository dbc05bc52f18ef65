# SPDX-License-Identifier: Apache-2.0
"""Engines with dense kernels or INT8 weights, against transformers with the same weights."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import EngineArgs
from vllm.config import set_current_vllm_config

from tests.engine.conftest import Answers, generate, transformers_answers
from vllm_mxfp4_sm120.checkpoint import required_tensors
from vllm_mxfp4_sm120.dense import linear as operator
from vllm_mxfp4_sm120.dense import native, plan
from vllm_mxfp4_sm120.dense.int8 import Int8Weights
from vllm_mxfp4_sm120.quantization import dense as quantization

TOLERANCE = 2e-2  # of a log-probability, as between BF16 engines and transformers
RANK, LORA_GAIN = 8, 0.2
ADAPTED = 3  # of the prompts, a second time


def dense(kind: str) -> dict:
    return {"mxfp4_sm120": {"dense": kind}}


def merged(model, adapter: Path):
    """A copy of transformers' model with an adapter's products added to its weights."""
    model = copy.deepcopy(model)
    factors = load_file(adapter / "adapter_model.safetensors")
    for name, a in factors.items():
        if name.endswith("lora_A.weight"):
            b = factors[name.replace("lora_A", "lora_B")]
            module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            module.weight.data += b.float() @ a.float()
    return model


@dataclass(frozen=True)
class Right:
    """transformers' answers with certain weights: alone, with the adapter, and what it says of the prompts."""

    alone: Answers
    adapted: Answers
    scores: list[list[float]]

    @classmethod
    def of(cls, model, prompts: list[list[int]], adapter: Path) -> Right:
        scores = []
        for ids in map(torch.tensor, prompts):
            with torch.no_grad():
                steps = model(ids[None]).logits[0, :-1].log_softmax(-1)
            scores.append(steps.gather(1, ids[1:, None])[:, 0].tolist())
        adapted = transformers_answers(merged(model, adapter), prompts[:ADAPTED])
        return cls(transformers_answers(model, prompts), adapted, scores)


@pytest.fixture(scope="module")
def adapter(tiny_config: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of attention's four projections, as PEFT saves it."""
    directory = tmp_path_factory.mktemp("adapter")
    generator = torch.Generator().manual_seed(5)
    names = {f"{letter}_proj.weight": f"{letter}_proj" for letter in "qkvo"}
    tensors = {}
    for name, info in required_tensors(tiny_config).items():
        if (module := names.get(name.rpartition("self_attn.")[2])) is not None:
            rows, columns = info.shape
            prefix = f"base_model.model.{name.rpartition('.self_attn.')[0]}.self_attn.{module}"
            a, b = (torch.randn(shape, generator=generator) for shape in ((RANK, columns), (rows, RANK)))
            tensors[f"{prefix}.lora_A.weight"] = (a * columns**-0.5).bfloat16()
            tensors[f"{prefix}.lora_B.weight"] = (b * LORA_GAIN).bfloat16()
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": sorted(names.values())}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def exact(transformers_model, prompts: list[list[int]], adapter: Path) -> Right:
    return Right.of(transformers_model, prompts, adapter)


@pytest.fixture(scope="module")
def rounded(transformers_model, prompts: list[list[int]], adapter: Path) -> Right:
    """With what `int8` rounds rounded, all else exact."""
    model = copy.deepcopy(transformers_model)
    linear = [getattr(layer.self_attn, f"{name}_proj") for layer in model.model.layers for name in "qkvo"]
    for module in (*linear, model.lm_head, model.model.embed_tokens):
        module.weight.data = Int8Weights.quantize(module.weight.data).decode()
    return Right.of(model, prompts, adapter)


@pytest.mark.parametrize(
    ("option", "refusal"),
    [
        ({"hf_overrides": {"head_dtype": "float32"}}, "dense int8 has no lm_head of dtype torch.float32"),
        ({"cpu_offload_gb": 1, "cpu_offload_params": {"self_attn"}}, "dense int8 and offloading"),
    ],
    ids=["head_dtype", "offload"],
)
def test_what_int8_excludes_is_refused_before_a_weight_is_read(tiny: Path, option: dict, refusal: str) -> None:
    options = {"quantization": "mxfp4_sm120", "additional_config": dense("int8"), **option}
    with pytest.raises(ValueError, match=refusal):
        EngineArgs(str(tiny), **options).create_engine_config()


# What an engine asks for beside `dense`: the layers that are then ours, and what is said.
LEFT_TO_VLLM: dict[str, tuple[str, dict, str, str | None]] = {
    "nothing": ("bf16", {}, "qkv_proj o_proj lm_head", None),
    "head_dtype": ("bf16", {"hf_overrides": {"head_dtype": "float32"}}, "qkv_proj o_proj", None),
    "offload": ("bf16", {"cpu_offload_gb": 1, "cpu_offload_params": {"self_attn"}}, "", "offloading to the CPU wants"),
    "linear_backend": ("bf16", {"linear_backend": "marlin"}, "", "--linear-backend marlin answers, not dense bf16"),
    **{
        f"{kind}, quantization_config {key}": (
            kind,
            {"quantization_config": {key: value}},
            "lm_head",
            f"--quantization-config answers for qkv_proj and o_proj, not dense {kind}",
        )
        for kind in ("bf16", "int8")
        for key, value in (("linear", "fp8_per_channel"), ("targets", {"re:.*o_proj": "fp8_per_block"}))
    },
}


class Proved:
    """What `Dense.prove` makes of an engine's configuration where a kernel is faster at some size, if `faster`."""

    def __init__(self, patch: pytest.MonkeyPatch, tiny: Path, additional: dict, faster: bool = True, **option) -> None:
        def make(layers, machine, prove) -> plan.Plan:
            timing = plan.Timing(8, "a", 1.0, 2.0 if faster else 1.0)
            return plan.Plan(None, {shape: [timing] for shape in layers.values()})

        self.warnings, self.other = [], []
        for name, lines in (("warning_once", self.warnings), ("debug_once", self.other), ("info_once", self.other)):
            patch.setattr(quantization.logger, name, lambda line, *values, lines=lines: lines.append(line % values))
        patch.setattr(quantization, "get_tensor_model_parallel_world_size", lambda: 1)
        patch.setattr(native, "configurations", lambda: (native.DenseConfiguration("a", False, 16, 256, 0),))
        patch.setattr(operator, "_kernels", {})
        patch.setattr(plan, "make", make)
        options = {"quantization": "mxfp4_sm120", "additional_config": additional, **option}
        self.config = EngineArgs(str(tiny), **options).create_engine_config()
        self.dense = quantization.Dense()
        self.dense.prove(self.config)

    def ours(self) -> set[str]:
        """Those of a layer's projections that have a method, lm_head where it would get one."""
        with set_current_vllm_config(self.config):
            names = ("qkv_proj", "o_proj", "router")
            taken = {name for name in names if self.dense.method(f"model.layers.0.attn.{name}")}
        return taken | (self.dense.shapes.keys() & {"lm_head"})


@pytest.mark.parametrize(("kind", "option", "ours", "said"), LEFT_TO_VLLM.values(), ids=LEFT_TO_VLLM)
def test_layers_that_are_left_to_vllm(
    tiny: Path, kind: str, option: dict, ours: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    proved = Proved(monkeypatch, tiny, dense(kind), **option)
    assert proved.ours() == set(ours.split())
    assert len(proved.warnings) == (said is not None) and (said or "") in "".join(proved.warnings)
    assert proved.config.additional_config == dense(kind if ours else "off")


@pytest.mark.parametrize(
    ("why_not", "option", "said"),
    [
        ("it needs an NVIDIA GPU", {}, "it needs an NVIDIA GPU, not dense bf16"),
        (None, {"linear_backend": "marlin"}, "--linear-backend marlin answers, not dense bf16"),
    ],
    ids=["no GPU", "linear_backend"],
)
def test_the_default_is_nothing_where_it_can_not_run(
    tiny: Path, why_not: str | None, option: dict, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line for whoever asks for debug lines; vLLM's own layers, and its own name for the compiled model."""
    monkeypatch.setattr(plan, "why_not", lambda machine: why_not)
    proved = Proved(monkeypatch, tiny, {}, **option)
    assert not proved.ours() and proved.config.additional_config == {}
    assert proved.warnings == [] and proved.other == [f"mxfp4_sm120: {said}"]


def test_the_default_where_it_can(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "why_not", lambda machine: None)
    proved = Proved(monkeypatch, tiny, {})
    assert proved.ours() == {"qkv_proj", "o_proj", "lm_head"} and proved.warnings == []
    assert proved.config.additional_config == dense("bf16")
    with monkeypatch.context() as patch:
        patch.setenv("MXFP4_SM120_DENSE", "off")
        off = Proved(monkeypatch, tiny, {})
        assert not off.ours() and not off.other and off.config.additional_config == dense("off")


def test_where_no_kernel_is_faster_the_model_is_vllms_own(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proved = Proved(monkeypatch, tiny, dense("bf16"), faster=False)
    assert not proved.ours() and proved.config.additional_config == dense("off")
    assert "by torch's linear, which was faster at every size" in proved.other[0]


# The kernels where no GPU is: fake_dense.py. Beside speculation they answer in test_answers.py, in a pipeline in
# test_ranks.py.
# On CPUs vLLM takes the last adapter's place for that of a prompt without one, so there are two places for one adapter.
LORA = {"enable_lora": True, "lora_target_modules": ["qkv_proj", "o_proj"], "max_lora_rank": RANK, "max_loras": 2}
ENGINES = {
    "bf16": ("bf16", True, {"enforce_eager": True, **LORA}),
    "int8, compiled": ("int8", True, {}),
    "int8, tensor parallel": ("int8", False, {"enforce_eager": True, "tensor_parallel_size": 2, **LORA}),
}
NO_GPU = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU the card's kernels answer: tests/gpu/test_dense.py"
)


@pytest.mark.parametrize(
    ("kind", "kernels", "engine"),
    [pytest.param(*values, id=name, marks=() if values[1] else NO_GPU) for name, values in ENGINES.items()],
)
def test_answers_are_those_of_the_weights(
    tiny: Path,
    prompts: list[list[int]],
    adapter: Path,
    tmp_path: Path,
    exact: Right,
    rounded: Right,
    kind: str,
    kernels: bool,
    engine: dict,
) -> None:
    env = {"FAKE_DENSE": "1"} if kernels else {}
    options = {"quantization": "mxfp4_sm120", "additional_config": dense(kind), **engine}
    adapted = ADAPTED if "enable_lora" in engine else 0
    answers = generate(
        tiny,
        [*prompts, *prompts[:adapted]],
        tmp_path,
        env,
        score=True,
        adapters=[None] * len(prompts) + [str(adapter)] * adapted,
        **options,
    )
    right, count = rounded if kind == "int8" else exact, len(prompts)
    alone = replace(answers, tokens=answers.tokens[:count], logprobs=answers.logprobs[:count])
    assert alone.worst_difference(right.alone) < TOLERANCE
    if adapted:
        with_adapter = replace(answers, tokens=answers.tokens[count:], logprobs=answers.logprobs[count:])
        assert with_adapter.worst_difference(right.adapted) < TOLERANCE
    for scores, expected in zip(answers.scores, right.scores, strict=False):
        assert scores == pytest.approx(expected, abs=TOLERANCE)
    log = (tmp_path / "engine.log").read_text()
    assert ("dense layers in INT8" in log) == (kind == "int8")
    if kernels:
        called = re.findall(r"fake_dense: (\d+) tokens of (.*)", log)
        # qkv_proj and lm_head have one shape here, but only one of them has a bias.
        assert len({layer for _, layer in called}) == 3 and {int(tokens) for tokens, _ in called} <= set(range(3, 17))
        assert f"{kind} by {kind}_fake at 3 to 16 tokens (9.0 us there, torch 12.0); else torch's linear" in log
    else:
        assert f"{kind} by torch's linear: it needs an NVIDIA GPU" in log


def test_the_adapter_is_seen(exact: Right) -> None:
    """Left out, or given to prompts without, answers would be ten tolerances away."""
    pairs = zip(exact.alone.logprobs, exact.adapted.logprobs, strict=False)
    difference = max(abs(a - b) for alone, adapted in pairs for a, b in zip(alone, adapted, strict=True))
    assert difference > 10 * TOLERANCE
