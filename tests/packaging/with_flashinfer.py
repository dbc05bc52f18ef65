# SPDX-License-Identifier: Apache-2.0
"""Against a real FlashInfer, which `test_flashinfer_releases.py` puts on the path: no GPU needed, and none used."""

import inspect
from dataclasses import fields

import flashinfer
import pytest
import torch
from flashinfer.fused_moe.core import get_w2_permute_indices_with_cache

from tests.support.layers import random_inputs, random_weights
from vllm_mxfp4_sm120.backends import flashinfer_trtllm as backend
from vllm_mxfp4_sm120.moe import Activation, MoEShape, MoEWeights, reference, topk_softmax
from vllm_mxfp4_sm120.platform import Machine

PADDED = MoEShape(8, 8, 512, 384, 4)  # sizes that need no padding
UNPADDED = MoEShape(8, 8, 320, 160, 4)  # 10 and 5 scale columns
PLAIN = MoEShape(8, 8, 320, 160, 2, has_bias=False, activation=Activation.SILU)


@pytest.fixture
def calls(monkeypatch):
    """FlashInfer's functions replaced by ones that bind to the real signatures and keep what they were given."""
    kept = {}

    def record(name, answer):
        signature = inspect.signature(getattr(flashinfer, name))

        def call(*args, **kwargs):
            kept[name] = signature.bind(*args, **kwargs).arguments  # TypeError: unknown, or required and not given
            return answer(kwargs, *args)

        monkeypatch.setattr(flashinfer, name, call)

    for name in ("trtllm_fp4_block_scale_moe", "trtllm_fp4_block_scale_routed_moe"):
        record(name, lambda given: given["output"].zero_())

    def quantize(given, x):
        columns = -(-x.shape[1] // given["alignment"]) * given["alignment"]
        values = torch.zeros(x.shape[0], columns, dtype=torch.float8_e4m3fn)
        return values, torch.zeros(x.shape[0] * columns // 32, dtype=torch.uint8)

    record("mxfp8_quantize", quantize)
    return kept


@pytest.mark.parametrize("shape", [PADDED, UNPADDED, PLAIN], ids=["padded", "unpadded", "plain"])
@pytest.mark.parametrize("cls", [backend.FlashInferTrtllm, backend.FlashInferTrtllmMxfp8], ids=["bf16", "mxfp8"])
def test_the_calls_bind(shape, cls, calls):
    layer = cls(shape)
    prepared = layer.prepare(random_weights(shape, "cpu"))
    x, logits = random_inputs(shape, 5, "cpu")
    topk_ids, topk_weights = topk_softmax(logits, shape.top_k)
    assert layer.forward_logits(prepared, x, logits).shape == x.shape
    assert layer.forward(prepared, x, topk_ids, topk_weights).shape == x.shape
    unrouted, routed = calls["trtllm_fp4_block_scale_moe"], calls["trtllm_fp4_block_scale_routed_moe"]
    assert unrouted["routing_logits"] is logits
    ids, weights = routed["topk_ids"]
    assert ids.dtype == torch.int32 and torch.equal(ids, topk_ids.int()) and torch.equal(weights, topk_weights)
    hidden, intermediate = -(-shape.hidden_size // 256) * 256, -(-shape.intermediate_size // 128) * 128
    for given in (unrouted, routed):
        assert given["routing_method_type"] == flashinfer.fused_moe.RoutingMethodType.Renormalize
        assert given["activation_type"] == flashinfer.tllm_enums.ActivationType.Swiglu
        assert given["output"].shape == x.shape and given["output"].dtype == torch.bfloat16
        assert given["hidden_states"].shape == (5, hidden) and given["intermediate_size"] == intermediate
        assert given["gemm1_weights"].shape == (8, 2 * intermediate, hidden // 2)
        assert given["gemm2_weights"].shape == (8, hidden, intermediate // 2)
        assert given["gemm1_weights"].dtype == given["gemm2_weights"].dtype == torch.uint8
        # The launcher wants this name on weight scales, and counts their elements to know the block size.
        assert given["gemm1_weights_scale"].dtype == given["gemm2_weights_scale"].dtype == torch.float8_e4m3fn
        assert given["gemm1_weights_scale"].numel() == 8 * 2 * intermediate * hidden // 32
        if cls.mxfp8:
            assert given["hidden_states"].dtype == given["hidden_states_scale"].dtype == torch.float8_e4m3fn
            assert given["hidden_states_scale"].shape == (5, hidden // 32)
        else:
            assert given["hidden_states"].dtype == torch.bfloat16 and given["hidden_states_scale"] is None
        oai = {name: given[f"gemm1_{name}"] for name in ("alpha", "beta", "clamp_limit")}
        if shape is PLAIN:
            assert set(oai.values()) == {None} and given["gemm1_bias"] is None and given["gemm2_bias"] is None
        else:
            for value, expected in zip(oai.values(), (1.702, 1.0, 7.0), strict=True):
                assert torch.equal(value, torch.full((8,), expected))
            assert given["gemm1_bias"].dtype == given["gemm2_bias"].dtype == torch.float32
            assert given["gemm1_bias"].shape == (8, 2 * intermediate)
    assert not cls.mxfp8 or calls["mxfp8_quantize"]["is_sf_swizzled_layout"] is False


def test_experts_on_other_ranks_get_an_id_that_is_not_local(calls):
    shape = MoEShape(16, 4, 320, 160, 4)
    layer = backend.FlashInferTrtllm(shape)
    prepared = layer.prepare(random_weights(shape, "cpu"))
    expert_map = torch.full((16,), -1, dtype=torch.int32)
    expert_map[torch.tensor([9, 1, 4, 7])] = torch.arange(4, dtype=torch.int32)
    x, logits = random_inputs(shape, 6, "cpu")
    layer.forward_logits(prepared, x, logits, expert_map)
    assert "trtllm_fp4_block_scale_moe" not in calls
    given = calls["trtllm_fp4_block_scale_routed_moe"]
    assert (given["num_experts"], given["local_expert_offset"], given["local_num_experts"]) == (16, 0, 4)
    wanted = [[{9: 0, 1: 1, 4: 2, 7: 3}.get(e, 4) for e in row] for row in topk_softmax(logits, 4)[0].tolist()]
    assert given["topk_ids"][0].tolist() == wanted


def padded(weights, hidden, intermediate):
    """The weights as vLLM allocates them for this backend: zeros up to its padded sizes."""
    wide = MoEWeights.empty(MoEShape(8, weights.w13.shape[0], hidden, intermediate, 4), "cpu")
    for field in fields(weights):
        small, large = getattr(weights, field.name), getattr(wide, field.name)
        large[tuple(slice(size) for size in small.shape)].copy_(small)
    return wide


@pytest.mark.parametrize("shape", [PADDED, UNPADDED], ids=["padded", "unpadded"])
def test_prepared_bytes_are_vllms_own(shape, monkeypatch):
    mxfp4 = pytest.importorskip("vllm.model_executor.layers.fused_moe.oracle.mxfp4")
    from vllm.model_executor.layers.quantization.utils.mxfp8_utils import swizzle_mxfp8_scale

    # FlashInfer interleaves scales on a GPU only; vLLM's own code for the same layout stands in.
    def interleave(scale):
        return swizzle_mxfp8_scale(scale, scale.shape[0], scale.shape[1] * 32).flatten()

    monkeypatch.setattr("flashinfer.fp4_quantization.nvfp4_block_scale_interleave", interleave)
    vllm_backend = mxfp4.Mxfp4MoeBackend.FLASHINFER_TRTLLM_MXFP4_BF16
    sizes = mxfp4.mxfp4_round_up_hidden_size_and_intermediate_size(
        vllm_backend, shape.hidden_size, shape.intermediate_size
    )
    wide = padded(random_weights(shape, "cpu"), *sizes)
    theirs = mxfp4.convert_gpt_oss_weight_to_mxfp4_moe_kernel_format(
        vllm_backend,
        torch.nn.Module(),
        wide.w13,
        wide.w2,
        wide.w13_scale,
        wide.w2_scale,
        wide.w13_bias,
        wide.w2_bias,
        _cache_permute_indices={},
    )
    ours = backend.FlashInferTrtllm(shape).prepare(random_weights(shape, "cpu"))
    for name, expected in zip(("w13", "w2", "w13_scale", "w2_scale", "w13_bias", "w2_bias"), theirs, strict=True):
        assert ours[name].dtype == expected.dtype and ours[name].shape == expected.shape
        assert torch.equal(ours[name].view(torch.uint8), expected.view(torch.uint8)), name


@pytest.mark.parametrize("shape", [PADDED, UNPADDED], ids=["padded", "unpadded"])
def test_undoing_the_layout_gives_the_layer(shape):
    prepared = backend.FlashInferTrtllm(shape).prepare(random_weights(shape, "cpu"))
    hidden, intermediate = shape.hidden_size, shape.intermediate_size

    def unshuffle(matrix):  # [E, rows, columns], rows as FlashInfer's helper orders them
        order = get_w2_permute_indices_with_cache({}, matrix[0].view(torch.uint8), 128)
        back = torch.empty_like(matrix)
        back[:, order] = matrix
        return back

    def uninterleave(scales):  # element by element, as FlashInfer's kernels compute the offset of (row, column)
        flat = scales.view(torch.uint8).flatten(1)
        row, column = torch.meshgrid(torch.arange(scales.shape[1]), torch.arange(scales.shape[2]), indexing="ij")
        tile = row // 128 * (scales.shape[2] // 4) + column // 4
        return flat[:, tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4]

    def up_gate_to_gate_up(matrix):
        return matrix.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)

    w13, w13_scale, w13_bias = (
        up_gate_to_gate_up(unshuffle(matrix))[:, : 2 * intermediate]
        for matrix in (prepared["w13"], uninterleave(prepared["w13_scale"]), prepared["w13_bias"][..., None])
    )
    w2, w2_scale, w2_bias = (
        unshuffle(matrix)[:, :hidden]
        for matrix in (prepared["w2"], uninterleave(prepared["w2_scale"]), prepared["w2_bias"][..., None])
    )
    undone = MoEWeights(
        w13[..., : hidden // 2],
        w13_scale[..., : hidden // 32],
        w2[..., : intermediate // 2],
        w2_scale[..., : intermediate // 32],
        w13_bias[..., 0],
        w2_bias[..., 0],
    )
    x, logits = random_inputs(shape, 9, "cpu")
    routing = topk_softmax(logits, shape.top_k)
    assert torch.equal(reference(undone, x, *routing), reference(random_weights(shape, "cpu"), x, *routing))


def test_why_not():
    shape = MoEShape(32, 32, 2880, 2880, 4)
    assert backend.FlashInferTrtllm.why_not(Machine((10, 0), (13, 0), "B200"), shape) is None
    assert backend.FlashInferTrtllm.why_not(Machine((10, 3), (13, 0), "B300"), shape) is None
