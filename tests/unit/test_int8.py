# SPDX-License-Identifier: Apache-2.0
"""INT8 weights against float64, and what loading does with them."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_mxfp4_sm120.dense import int8
from vllm_mxfp4_sm120.dense.int8 import BLOCK, Int8Weights
from vllm_mxfp4_sm120.quantization.dense import Int8Method, Report

WORKSPACE = 9 << 20  # of encoding, at most


def weights(rows: int, blocks: int, seed: int, exponent: int = -6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, blocks * BLOCK, generator=generator) * 2.0**exponent).bfloat16()


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**31), st.integers(-110, 110))
def test_each_code_is_the_nearest(rows: int, blocks: int, seed: int, exponent: int) -> None:
    """No value is off by more than half a step; the largest of a block, by 0.4 % where its scale was rounded down."""
    weight = weights(rows, blocks, seed, exponent)
    encoded = Int8Weights.quantize(weight)
    step = encoded.scales_of().double().repeat_interleave(BLOCK, 1)
    off = (encoded.codes.double() * step - weight.double()).abs()
    assert (off <= torch.maximum(step / 2, weight.double().abs() / 256)).all()
    assert encoded.codes.min() >= -127


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**31), st.integers(-110, 110))
def test_decoded_and_encoded_again_is_the_same(rows: int, blocks: int, seed: int, exponent: int) -> None:
    weight = weights(rows, blocks, seed, exponent)
    weight[0] = 0
    weight[-1, ::3] *= 2.0**-20
    once = Int8Weights.quantize(weight)
    again = Int8Weights.quantize(once.decode())
    assert torch.equal(once.codes, again.codes) and torch.equal(once.scales, again.scales)


def test_relative_error() -> None:
    weight = weights(256, 90, 0)
    encoded = Int8Weights.quantize(weight)
    difference = encoded.decode(dtype=torch.float64) - weight.double()
    assert encoded.relative_error(weight).item() == pytest.approx((difference.norm() / weight.double().norm()).item())
    assert 0.004 < encoded.relative_error(weight) < 0.006
    zeros = torch.zeros(3, BLOCK)
    assert Int8Weights.quantize(zeros).relative_error(zeros) == 0


@pytest.mark.parametrize("tokens", [(), (1,), (5,), (0,), (2, 3)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("decoded", [1, 7 * 3 * BLOCK, int8.DECODED])
def test_linear(monkeypatch: pytest.MonkeyPatch, tokens: tuple[int, ...], with_bias: bool, decoded: int) -> None:
    """Whole or a few rows at a time, against float64 on the BF16 weights."""
    monkeypatch.setattr(int8, "DECODED", decoded)
    weight, x = weights(50, 3, 1), weights(max(1, *tokens, 1) * 6, 3, 2, 0)
    x = x[: torch.Size(tokens).numel()].reshape(*tokens, 3 * BLOCK)
    bias = weights(1, 2, 3)[0, :50] if with_bias else None
    got = Int8Weights.quantize(weight).linear(x, bias)
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert got.dtype == torch.bfloat16 and got.shape == (*tokens, 50)
    assert (got.double() - exact).norm() <= 1e-2 * exact.norm()


@pytest.mark.parametrize("largest", [3.38953139e38, 1e-37, 1e-39, 1e-40, 0.0], ids=str)
def test_the_ends_of_bf16(largest: float) -> None:
    """Finite, and no further off than the scale can say: 0.4 %, or half a step where BF16 is denormal."""
    weight = weights(3, 2, 8, 0)
    weight[1] *= largest / weight[1].abs().max().double()
    weight[1, 7] = -largest
    encoded = Int8Weights.quantize(weight)
    decoded = encoded.decode(dtype=torch.bfloat16)
    assert decoded.isfinite().all()
    steps = encoded.scales_of().double().repeat_interleave(BLOCK, 1)
    off = (decoded.double() - weight.double()).abs()
    assert (off <= weight.double().abs() / 128 + steps / 2 + 64 * 2.0**-133).all()
    assert torch.equal(decoded[[0, 2]], Int8Weights.quantize(weight[[0, 2]]).decode(dtype=torch.bfloat16))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(value: float) -> None:
    """Loading refuses it; what gets here all the same must not become a plausible number."""
    weight = weights(3, 2, 9)
    weight[1, 40] = value
    decoded = Int8Weights.quantize(weight).decode()
    assert decoded[1, 32:].isnan().any() and decoded[[0, 2]].isfinite().all()


class Live(TorchDispatchMode):
    """Bytes of all tensors made within and still there, and the most there have been."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and (storage := out.untyped_storage())._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.bytes += storage.nbytes()
            self.most = max(self.most, self.bytes)
            weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return out

    def gone(self, key: int, nbytes: int) -> None:
        self.seen.remove(key)
        self.bytes -= nbytes


class Layer(torch.nn.Module):
    prefix = "layer"
    params_dtype = torch.bfloat16


def made(weight: torch.Tensor, method: Int8Method, layer: Layer | None = None) -> Layer:
    layer = layer or Layer()

    def load(param: Parameter, loaded: torch.Tensor, rows: slice = slice(None)) -> None:
        param.data[rows].copy_(loaded)

    method.create_weights(layer, weight.shape[1], [*weight.shape[:1]], 0, 0, torch.bfloat16, weight_loader=load)
    layer.weight.weight_loader(layer.weight, weight)
    method.process_weights_after_loading(layer)
    return layer


def test_an_update_replaces_what_it_brings_and_nothing_else() -> None:
    """As trainers send them: one part of qkv, into a layer that is served, in the tensors that it holds."""
    before, after = weights(12, 2, 4), weights(12, 2, 5)
    layer = made(before, Int8Method(Report()))
    place, scales = layer.weight.data_ptr(), layer.weight_scale.data_ptr()
    layer.weight.weight_loader(layer.weight, after[4:8], slice(4, 8))
    expected = Int8Weights.quantize(torch.cat([before[:4], after[4:8], before[8:]]))
    assert torch.equal(layer.weight, expected.codes) and torch.equal(layer.weight_scale, expected.scales)
    assert (layer.weight.data_ptr(), layer.weight_scale.data_ptr()) == (place, scales)


def test_what_is_encoded_is_not_encoded_again() -> None:
    """Some trainers call this for a whole engine, whatever they have changed of it."""
    layer = made(weights(12, 2, 10), method := Int8Method(Report()))
    codes = layer.weight.clone()
    method.process_weights_after_loading(layer)
    assert torch.equal(layer.weight, codes) and not (layer.weight_scale == 1).any()


def test_tied_tables_are_kept_once() -> None:
    report, weight = Report(waiting=2), Parameter(weights(8, 2, 6), requires_grad=False)
    weight.weight_loader = None
    embedding, head = Layer(), Layer()
    for layer in (embedding, head):
        layer.register_parameter("weight", weight)
    for layer in (embedding, head):
        Int8Method(report).process_weights_after_loading(layer)
    assert (report.waiting, report.before, len(report.errors)) == (0, weight.nbytes, 1)
    assert embedding.weight.dtype == head.weight.dtype == torch.int8
    assert embedding.weight.data_ptr() == head.weight.data_ptr()
    assert embedding.weight_scale.data_ptr() == head.weight_scale.data_ptr()
    assert made(weights(8, 2, 7), Int8Method(report)).weight.data_ptr() != head.weight.data_ptr()


def test_loading_takes_one_layers_codes_beside_the_bf16_weights() -> None:
    """And leaves the codes. gpt-oss-20b's embedding is the largest layer: 587 MiB of them, and all is BF16 then."""
    report = Report(waiting=3)
    with Live() as live:
        layers = [Layer(), Layer(), Layer()]
        for layer, rows in zip(layers, (2000, 500, 2000), strict=True):
            layer.weight = Parameter(torch.ones(rows, 64 * BLOCK, dtype=torch.bfloat16), requires_grad=False)
            layer.weight.weight_loader = None
        loaded, largest = live.bytes, layers[0].weight.nbytes * 17 // 32
        for layer in layers:
            Int8Method(report).process_weights_after_loading(layer)
        print(f"{(live.most - loaded - largest) / 2**20:.1f} MiB more than the codes")
        assert loaded == report.before and live.most - loaded - largest <= WORKSPACE
        report.errors.clear()
        assert live.bytes == report.after == report.before * 17 // 32
    assert 201088 * 2880 * 17 // 16 + WORKSPACE <= 600 << 20
