# SPDX-License-Identifier: Apache-2.0
"""The layer's mathematics against transformers' GPT-OSS, in float64."""

import pytest
import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

from tests.support.layers import random_weights
from vllm_mxfp4_sm120 import mxfp4
from vllm_mxfp4_sm120.moe import Activation, MoEShape, MoEWeights, activate, reference, topk_softmax

SHAPE = MoEShape(num_experts=6, local_experts=6, hidden_size=96, intermediate_size=64, top_k=3)


def test_the_reference_is_transformers_layer():
    weights = random_weights(SHAPE, "cpu")
    weights.w13_bias.mul_(20)  # far enough to reach the clamps at 7 on both sides
    config = GptOssConfig(
        num_local_experts=6, hidden_size=96, intermediate_size=64, num_experts_per_tok=3, num_hidden_layers=1
    )
    config._experts_implementation = "eager"
    theirs = GptOssMLP(config).double()
    with torch.no_grad():
        theirs.router.weight.normal_(std=0.1)
        theirs.router.bias.normal_(std=0.1)
        theirs.experts.gate_up_proj.copy_(mxfp4.dequantize(weights.w13, weights.w13_scale, torch.float64).mT)
        theirs.experts.gate_up_proj_bias.copy_(weights.w13_bias)
        theirs.experts.down_proj.copy_(mxfp4.dequantize(weights.w2, weights.w2_scale, torch.float64).mT)
        theirs.experts.down_proj_bias.copy_(weights.w2_bias)
        x = torch.randn(1, 50, 96, dtype=torch.float64)
        expected = theirs(x)[0][0]
        logits = torch.nn.functional.linear(x[0], theirs.router.weight, theirs.router.bias)
    ids, gates = topk_softmax(logits, SHAPE.top_k)
    ours = reference(weights, x[0], ids, gates)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)  # their gates are float64, ours float32


def test_experts_that_live_elsewhere_are_left_out_and_ranks_add_up():
    weights = random_weights(SHAPE, "cpu")
    x = torch.randn(9, 96).bfloat16()
    ids, gates = topk_softmax(torch.randn(9, 6), 3)
    total = torch.zeros(9, 96, dtype=torch.float64)
    for mine in ([0, 2, 5], [1, 3, 4]):
        expert_map = torch.full((6,), -1, dtype=torch.int32)
        expert_map[mine] = torch.arange(3, dtype=torch.int32)
        part = MoEWeights(**{name: tensor[mine] for name, tensor in vars(weights).items()})
        total += reference(part, x, ids, gates, expert_map=expert_map)
    torch.testing.assert_close(total, reference(weights, x, ids, gates))


def test_equal_logits_go_to_the_lower_id_and_nan_is_the_largest():
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[1.0, 2, 2, 2], [1, nan, 5, nan], [inf, 0, 0, 1], [-inf, 3, -inf, -inf], [-inf] * 4])
    ids, gates = topk_softmax(logits.bfloat16(), 2)
    assert ids.tolist() == [[1, 2], [1, 3], [0, 3], [1, 0], [0, 1]]
    assert gates[0].tolist() == [0.5, 0.5] and gates[3].tolist() == [1, 0]
    assert gates[[1, 4]].isnan().all() and gates[2, 0].isnan()


@pytest.mark.parametrize(
    "counts, message",
    [
        ((0, 0, 1), "a layer of 0 experts, expected at least 1"),
        ((4, 5, 1), "5 local experts of 4, expected 0 to all of them"),
        ((4, 4, 5), "5 experts per token of 4, expected 1 to 4"),
        ((4, 4, 0), "0 experts per token of 4, expected 1 to 4"),
    ],
)
def test_a_layer_without_meaning_is_refused(counts, message):
    experts, local, top_k = counts
    with pytest.raises(ValueError, match=f"^{message}$"):
        MoEShape(experts, local, 64, 64, top_k)


def test_silu_is_torchs():
    gate_up = torch.randn(5, 12)
    expected = torch.nn.functional.silu(gate_up[:, ::2]) * gate_up[:, 1::2]
    torch.testing.assert_close(activate(gate_up, Activation.SILU), expected)


@pytest.mark.parametrize("has_bias", [True, False])
def test_codes_and_scales_of_an_expert_share_one_run_of_bytes(has_bias):
    shape = MoEShape(6, 4, 96, 64, 3, has_bias)
    weights = MoEWeights.empty(shape, "cpu")
    for codes, scales, rows, k in ((weights.w13, weights.w13_scale, 128, 96), (weights.w2, weights.w2_scale, 96, 64)):
        assert codes.shape == (4, rows, k // 2) and scales.shape == (4, rows, k // 32)
        assert codes.untyped_storage().data_ptr() == scales.untyped_storage().data_ptr()
        assert scales[0].data_ptr() == codes[0].data_ptr() + codes[0].numel()
        assert codes[1].data_ptr() == scales[0].data_ptr() + scales[0].numel()
    assert (weights.w13_bias is None) is (weights.w2_bias is None) is not has_bias
    packed = sum(t.numel() for t in (weights.w13, weights.w13_scale, weights.w2, weights.w2_scale))
    assert packed == 4 * shape.packed_bytes_per_expert
