"""The Triton backend: right under Triton's interpreter, and its kernels compile for every family, without a GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from vllm_mxfp4_sm120.backends import triton as backend
from vllm_mxfp4_sm120.moe import MoEShape
from vllm_mxfp4_sm120.mxfp4 import dequantize
from vllm_mxfp4_sm120.platform import Machine
from vllm_mxfp4_sm120.proof import random_inputs, random_weights

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

# Kernels are interpreted if TRITON_INTERPRET=1 was set when they were defined: hence a process of their own.
INTERPRETED = """
import torch
from vllm_mxfp4_sm120.backends.triton import Triton
from vllm_mxfp4_sm120.moe import Activation, MoEShape, reference, topk_softmax
from vllm_mxfp4_sm120.proof import random_inputs, random_weights
torch.set_num_threads(1)

def check(shape, tokens, expert_map=None, ids=torch.int32):
    layer = Triton(shape)
    loaded = random_weights(shape, "cpu")
    weights = loaded.clone()
    prepared = layer.prepare(loaded)
    x, logits = random_inputs(shape, tokens, "cpu")
    topk_ids, topk_weights = topk_softmax(logits, shape.top_k)
    expected = reference(weights, x, topk_ids, topk_weights, shape.activation, expert_map)
    routed = layer.forward(prepared, x, topk_ids.to(ids), topk_weights, expert_map)
    unrouted = layer.forward_logits(prepared, x, logits, expert_map)
    for answer in (routed, unrouted):
        assert answer.dtype == torch.bfloat16 and answer.shape == x.shape
        error = float((answer.double() - expected).norm() / expected.norm().clamp(min=1e-30))
        assert error < 8e-3, (shape, tokens, error)  # the interpreter truncates to BF16, GPUs round

# Odd numbers of blocks in both reductions; one token; an expert with more pairs than a tile; int64 ids.
check(MoEShape(8, 8, 96, 160, 4), 1, ids=torch.int64)
check(MoEShape(8, 8, 96, 160, 4), 20)
# More pairs than one program ranks, so they are counted first; no bias; plain SiLU.
check(MoEShape(4, 4, 64, 32, 4, has_bias=False, activation=Activation.SILU), 67)
# Half the experts live elsewhere, in no order; a rank none of whose experts were chosen.
some = torch.full((16,), -1, dtype=torch.int32)
some[torch.tensor([9, 1, 4, 7])] = torch.arange(4, dtype=torch.int32)
check(MoEShape(16, 4, 64, 96, 2), 5, some)
none = torch.full((16,), -1, dtype=torch.int32)
none[0] = 0  # random_inputs sends nobody to expert 0
layer = Triton(MoEShape(16, 1, 64, 64, 2))
prepared = layer.prepare(random_weights(layer.shape, "cpu"))
x, logits = random_inputs(layer.shape, 3, "cpu")
assert not layer.forward_logits(prepared, x, logits, none).any()
assert layer.forward_logits(prepared, x[:0], logits[:0]).shape == (0, 64)
print("right")
"""


@needs_triton
def test_right_under_the_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=env, timeout=300)
    assert done.stdout.strip() == "right", done.stderr[-2000:]


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
def test_scales_beyond_its_range_are_refused():
    shape = MoEShape(4, 4, 64, 96, 2)
    weights = random_weights(shape, "cpu")
    weights.w2_scale[3, 5, 1] = 129
    with pytest.raises(ValueError, match=r"^w2_scale holds 129, the triton backend takes at most 128 \(2\^1\): set"):
        backend.Triton(shape).prepare(weights)


@needs_triton
@pytest.mark.parametrize(
    ("capability", "shared_memory", "ptx"), [(80, 163, "sm_80"), (90, 227, "sm_90a"), (120, 99, "sm_120a")]
)
def test_compiles_for(capability, shared_memory, ptx, monkeypatch):
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
    prepared = layer.prepare(random_weights(shape, "cpu"))
    for tokens in (1, 60, 1000):  # one for each choice of tiles
        layer.forward_logits(prepared, *random_inputs(shape, tokens, "cpu"))
    names = {name for name, _ in compiled}
    assert names == {"_route", "_count", "_place", "_gate_up", "_down", "_combine"}
    for kernel in compiled.values():
        assert f".target {ptx}" in kernel.asm["ptx"]
        assert kernel.metadata.shared <= shared_memory * 1024
    assert "wgmma" in compiled["_gate_up", 128].asm["ptx"] or capability != 90


def test_why_not(monkeypatch):
    shape, card = MoEShape(32, 32, 2880, 2880, 4), Machine((12, 0), (12, 8), "RTX 5090")
    assert backend.Triton.why_not(Machine(None, None), shape) == "Triton needs an NVIDIA GPU"
    if find_spec("triton"):
        assert backend.Triton.why_not(card, shape) is None
    assert backend.Triton.why_not(card, MoEShape(32, 32, 2880, 720, 4)) == "sizes 2880 x 720 are no multiples of 32"
    monkeypatch.setattr(backend, "triton", None)
    assert backend.Triton.why_not(card, shape) == "Triton is not installed"
