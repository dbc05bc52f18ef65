# SPDX-License-Identifier: Apache-2.0
"""The FP4 kernels on a GPU: on SM 12.x, or with their twin on any card, from a library built for it:

kernels/build.sh -- -DMXFP4_SM120_FP4_TWIN=ON
"""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.support.layers import BAD, OVERFLOWS, adversarial, random_weights
from vllm_mxfp4_sm120 import proof, selector
from vllm_mxfp4_sm120.backends.native import Native, fp4, library
from vllm_mxfp4_sm120.fp4 import plan, trial
from vllm_mxfp4_sm120.moe import MoEShape, reference, topk_softmax
from vllm_mxfp4_sm120.platform import Machine

CONFIGS = range(8)
# Of a layer's output against float64, by terms.
TOLERANCE = {1: 0.25, 2: 3.2e-2, 3: 3.6e-3, 4: 2.1e-3}
GPT_OSS = MoEShape(32, 32, 2880, 2880, 4)
# A sixteenth of its work: both K end in half a step, and the last row blocks have fewer tile rows.
SMALL = MoEShape(16, 16, 1440, 736, 4)


@pytest.fixture(scope="module", autouse=True)
def _fp4_here() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    capability = Machine.here().capability
    if library.find(capability) is None:
        pytest.skip("the CUDA library isn't built")
    library.load()
    if (reason := fp4.why_not(capability)) is not None:
        pytest.skip(reason)


@cache
def prepared_of(shape: MoEShape) -> dict[str, Tensor]:
    """Random weights as the kernels take them."""
    return Native(shape).prepare(random_weights(shape, "cuda").clone())


@cache
def problem(shape: MoEShape, tokens: int) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Weights prepared, x, topk_ids and topk_weights, on the GPU."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, shape.hidden_size, generator=generator).bfloat16()
    ids, gates = topk_softmax(torch.randn(tokens, shape.num_experts, generator=generator), shape.top_k)
    return prepared_of(shape), x.cuda(), ids.int().contiguous().cuda(), gates.contiguous().cuda()


@cache
def right(shape: MoEShape, tokens: int) -> Tensor:
    """Its answer in float64."""
    _, x, ids, gates = problem(shape, tokens)
    return reference(random_weights(shape, "cuda"), x, ids.long(), gates, shape.activation)


def forced(shape: MoEShape, config: int, first: int = 0) -> Native:
    """The backend with this kernel from so many tokens on."""
    layer = Native(shape)
    layer.fp4_kernels = ((first - 1, None), (math.inf, config))
    return layer


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        (GPT_OSS, 300),
        (MoEShape(32, 32, 2880, 1440, 4), 1000),
        (MoEShape(8, 8, 2880, 736, 2, has_bias=False), 77),
        (MoEShape(5, 5, 96, 32, 3), 1),
        (MoEShape(3, 3, 352, 672, 1), 513),
        (MoEShape(2, 2, 7168, 4096, 1), 100),
        (MoEShape(256, 256, 256, 128, 8, has_bias=False), 300),
    ],
    ids=str,
)
def test_right(config: int, shape: MoEShape, tokens: int):
    prepared, x, ids, gates = problem(shape, tokens)
    out = forced(shape, config).forward(prepared, x, ids, gates)
    error = float((out.double() - right(shape, tokens)).norm() / right(shape, tokens).norm())
    assert error <= TOLERANCE[fp4.configurations()[config].terms], error


@pytest.mark.parametrize("config", CONFIGS)
def test_a_rank_s_experts_of_which_most_tokens_choose_one(config: int):
    shape, tokens = MoEShape(16, 4, 1440, 736, 4), 500
    prepared, x, *_ = problem(shape, tokens)
    expert_map = proof.problem.scattered(shape, "cuda")
    logits = torch.randn(tokens, shape.num_experts, generator=torch.Generator().manual_seed(1)).cuda()
    logits[:, 3] += 5  # is the first of the local ones
    out = forced(shape, config).forward_logits(prepared, x, logits, expert_map)
    expected = reference(
        random_weights(shape, "cuda"), x, *topk_softmax(logits, shape.top_k), shape.activation, expert_map
    )
    error = float((out.double() - expected).norm() / expected.norm())
    assert error <= TOLERANCE[fp4.configurations()[config].terms], error


@pytest.mark.parametrize("config", CONFIGS)
def test_bad_rows_stay_alone(config: int):
    """As in the emulator, numbers and bounds too: NaN and infinity make their token NaN and no other."""
    shape = MoEShape(4, 4, 96, 96, 2)
    layer, weights = forced(shape, config), random_weights(shape)
    prepared = {name: tensor.cuda() for name, tensor in layer.prepare(weights.clone()).items()}
    x, logits = adversarial(40, 96), torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    others = torch.ones(40, dtype=torch.bool)
    others[BAD] = others[OVERFLOWS] = False
    out = layer.forward_logits(prepared, x.cuda(), logits.cuda()).cpu()
    assert out[BAD].isnan().all()
    expected = reference(weights, x[others], *topk_softmax(logits[others], shape.top_k), shape.activation)
    errors = (out[others].double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.max() <= (0.4, 0.12, 5e-3, 2.5e-3)[fp4.configurations()[config].terms - 1], errors
    x[BAD] = 0
    assert torch.equal(layer.forward_logits(prepared, x.cuda(), logits.cuda()).cpu()[others], out[others])


@pytest.mark.parametrize(("shape", "tokens", "times"), [(SMALL, 300, 1000), (GPT_OSS, 600, 50)], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_the_same_bits_a_thousand_times(config: int, shape: MoEShape, tokens: int, times: int):
    prepared, x, ids, gates = problem(shape, tokens)
    layer = forced(shape, config)
    first, different = layer.forward(prepared, x, ids, gates), torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(times):
        different |= (layer.forward(prepared, x, ids, gates) != first).any()
    assert not different


@pytest.mark.parametrize("config", CONFIGS)
def test_in_a_cuda_graph(config: int):
    prepared, x, ids, gates = problem(GPT_OSS, 200)
    expected = forced(GPT_OSS, config).forward(prepared, x, ids, gates)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forced(GPT_OSS, config).forward(prepared, x, ids, gates)
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)


def test_one_workspace_for_all_kernels_of_a_call():
    """vLLM measures memory by one call, whose kernel may be a BF16 one. On a stream of its own: a new workspace."""
    prepared, x, ids, gates = problem(SMALL, 300)
    with torch.cuda.stream(torch.cuda.Stream()):
        Native(SMALL).forward(prepared, x, ids, gates)
        taken = torch.cuda.memory_allocated()
        for config in CONFIGS:
            forced(SMALL, config).forward(prepared, x[:280], ids[:280], gates[:280])
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == taken


def test_compiled_and_checked_by_torch():
    shape = MoEShape(4, 4, 96, 96, 2)
    layer = forced(shape, 4)
    prepared, x, ids, gates = problem(shape, 40)
    compiled = torch.compile(lambda *given: layer.forward(prepared, *given), fullgraph=True)
    assert torch.equal(compiled(x, ids, gates), layer.forward(prepared, x, ids, gates))
    biases = prepared["w13_bias"], prepared["w2_bias"]
    arguments = (x, prepared["w13"], prepared["w2"], *biases, None, ids, gates, None, 4, 2, True, 4)
    torch.library.opcheck(torch.ops.mxfp4_sm120.fp4_moe_layer.default, arguments)


def captured(
    layer: Native, prepared: dict[str, Tensor], x: Tensor, logits: Tensor
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    layer.forward_logits(prepared, x, logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.forward_logits(prepared, x, logits)
    return graph, out


def test_a_plan_in_cuda_graphs():
    """A graph for each number of tokens holds the kernel that the plan says: below 256 BF16's, then four terms."""
    four = plan.Plan(None, 4, ((255, plan.BF16), (math.inf, "terms4_tokens128")))
    layer = selector.Choice(Native, "default", Machine.here(), activations=four).layer(GPT_OSS)
    number = [config.name for config in fp4.configurations()].index("terms4_tokens128")
    prepared = prepared_of(GPT_OSS)
    for tokens, other in ((255, forced(GPT_OSS, number)), (256, Native(GPT_OSS)), (700, Native(GPT_OSS))):
        x = torch.randn(tokens, GPT_OSS.hidden_size, device="cuda").bfloat16()
        logits = torch.randn(tokens, GPT_OSS.num_experts, device="cuda").bfloat16()
        graph, out = captured(layer, prepared, x, logits)
        x.copy_(torch.randn_like(x))
        graph.replay()
        same = Native(GPT_OSS) if tokens < 256 else forced(GPT_OSS, number)
        assert torch.equal(out, same.forward_logits(prepared, x, logits))
        assert not torch.equal(out, other.forward_logits(prepared, x, logits))


@pytest.mark.parametrize("shape", [GPT_OSS, MoEShape(16, 4, 1440, 736, 4)], ids=["whole", "a rank's experts"])
def test_the_trial_in_a_process_of_its_own(shape: MoEShape):
    """Every kernel of two terms and more is right by the proof's own problem, and timed, whichever is faster."""
    problem = proof.problem_shape(Machine.here(), shape)
    answer = proof.run_in_child(
        plan.TRIAL, {"layer": asdict(shape), "problem": asdict(problem), "device": "cuda:0"}, seconds=300
    )
    assert answer.reason is None, answer
    found = plan.Trial.from_json(answer.found)
    names = {plan.BF16, *(config.name for config in fp4.configurations() if config.terms > 1)}
    assert found.wrong == {} and found.errors.keys() == names
    assert [timed.tokens for timed in found.times] == list(trial.TIMED)
    assert all(timed.by_kernel.keys() == names for timed in found.times)
    print(answer.found)
