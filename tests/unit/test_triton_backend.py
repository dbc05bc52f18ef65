# SPDX-License-Identifier: Apache-2.0
"""The Triton backend: its layout, and its kernels compile for every family. tests/conformance runs them."""

from importlib.util import find_spec

import pytest
import torch

from tests.support.layers import random_inputs, random_weights
from vllm_mxfp4_sm120.backends import triton as backend
from vllm_mxfp4_sm120.moe import MoEShape
from vllm_mxfp4_sm120.mxfp4 import dequantize
from vllm_mxfp4_sm120.platform import Machine

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_repacked_codes_decode_to_the_same_weights():
    """The kernel's own bit moves, in torch: every code in every place of a word, against `mxfp4.dequantize`."""
    codes = torch.randint(0, 256, (64, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    scales = torch.randint(100, 129, (64, 1), dtype=torch.uint8)
    word = backend._repack(codes.view(torch.int32)).long() & 0xFFFFFFFF
    pairs = [word & 0x81C081C0, word << 3 & 0x81C081C0, word << 6 & 0x81C081C0]
    pairs.append((word << 1 & 0x80008000) | (word >> 5 & 0x01000100) | (word >> 4 & 0x00C000C0))
    bits = torch.stack([half for pair in pairs for half in (pair & 0xFFFF, pair >> 16 & 0xFFFF)], dim=-1).flatten(1)
    value = (bits << 16).to(torch.int32).view(torch.float32).double() * torch.exp2(scales.double() - 1)
    assert torch.equal(value, dequantize(codes, scales, torch.float64))


@needs_triton
def test_prepare_works_in_place():
    shape = MoEShape(4, 4, 64, 96, 2)
    weights = random_weights(shape, "cpu")
    addresses = {name: tensor.data_ptr() for name, tensor in vars(weights).items()}
    prepared = backend.Triton(shape).prepare(weights)
    assert {name: tensor.data_ptr() for name, tensor in prepared.items()} == addresses


@needs_triton
@pytest.mark.parametrize("low, high", [(0, 128), (43, 176), (119, 252), (252, 252)])
def test_scales_are_lowered_where_they_are_large(low, high):
    """By as much as keeps every weight exact."""
    shape = MoEShape(4, 4, 64, 96, 2)
    weights = random_weights(shape, "cpu")
    weights.w2_scale[3] = torch.randint(low, high + 1, (64, 3), dtype=torch.uint8)
    weights.w2_scale[3, 0, :2] = torch.tensor([low, high], dtype=torch.uint8)
    weights.w2[2, 7, :16], weights.w2_scale[2, 7, 0] = 0x80, 254  # a block of zeros counts for nothing
    original = weights.clone()
    prepared = backend.Triton(shape).prepare(weights)
    assert ("w2_factor" in prepared) is (high > 128) and "w13_factor" not in prepared
    scales = prepared["w2_scale"].mT
    assert scales.max() <= 133
    factor = prepared.get("w2_factor", torch.ones(4)).double()
    values = dequantize(original.w2, scales, torch.float64) * (factor * 2**-5)[:, None, None]
    original.w2_scale[2, 7, 0] = 128
    assert torch.equal(values, dequantize(original.w2, original.w2_scale, torch.float64))


@needs_triton
@pytest.mark.parametrize("scales, said", [((3, 137), "are 3 to 137"), ((200, 253), "are 200 to 253")])
def test_scales_beyond_its_range_are_refused(scales, said):
    shape = MoEShape(4, 4, 64, 96, 2)
    weights = random_weights(shape, "cpu")
    weights.w2_scale[3], weights.w2_scale[3, 5, 1] = scales
    reason = backend.Triton.why_not_weights(weights)
    assert reason.startswith(f"down_proj_scales[3] {said}, the triton backend takes up to 252, no")


@needs_triton
@pytest.mark.parametrize(
    ("capability", "shared_memory", "ptx", "large"),
    [(80, 163, "sm_80", 0), (90, 227, "sm_90a", 0), (120, 99, "sm_120a", 0), (120, 99, "sm_120a", 20)],
)
def test_compiles_for(capability, shared_memory, ptx, large, monkeypatch):
    """Every kernel of a decoding and of a prefill step, with the real call's arguments and tiles, fits the card."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return capability

        def get_current_stream(self, device):
            return 0

    compiled = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled[self.__name__, kwargs.get("BLOCK_M")] = run(self, *args, grid=grid, warmup=True, **kwargs)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", Driver())
    shape = MoEShape(4, 4, 288, 288, 2)
    layer = backend.Triton(shape)
    weights = random_weights(shape, "cpu")
    weights.w13_scale += large
    prepared = layer.prepare(weights)
    for tokens in (1, 60, 1000):  # one for each choice of tiles
        layer.forward_logits(prepared, *random_inputs(shape, tokens, "cpu"))
    names = {name for name, _ in compiled}
    assert names == {"route", "count", "place", "gate_up", "down", "combine"}
    for kernel in compiled.values():
        assert f".target {ptx}" in kernel.asm["ptx"]
        assert kernel.metadata.shared <= shared_memory * 1024
    assert "min.NaN.f32" in compiled["gate_up", 128].asm["ptx"]
    assert "wgmma" in compiled["gate_up", 128].asm["ptx"] or capability != 90


def test_why_not(monkeypatch):
    shape, card = MoEShape(32, 32, 2880, 2880, 4), Machine((12, 0), (12, 8), "RTX 5090")
    assert backend.Triton.why_not(Machine(None, None), shape) == "Triton needs an NVIDIA GPU"
    if find_spec("triton"):
        assert backend.Triton.why_not(card, shape) is None
    assert backend.Triton.why_not(card, MoEShape(32, 32, 2880, 720, 4)) == "sizes 2880 x 720 are no multiples of 32"
    monkeypatch.setattr(backend, "triton", None)
    assert backend.Triton.why_not(card, shape) == "Triton is not installed"
