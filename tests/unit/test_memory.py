# SPDX-License-Identifier: Apache-2.0
"""Byte accounting, the guard before an upcast, and torch's settings."""

import logging
import os

import pytest
import torch

from vllm_mxfp4_sm120 import memory
from vllm_mxfp4_sm120.backends.upcast import Upcast
from vllm_mxfp4_sm120.moe import MoEShape, MoEWeights
from vllm_mxfp4_sm120.platform import Machine

GPT_OSS_20B = MoEShape(num_experts=32, local_experts=32, hidden_size=2880, intermediate_size=2880, top_k=4)
SMALL = MoEShape(num_experts=6, local_experts=3, hidden_size=96, intermediate_size=64, top_k=2)
RTX_5090 = Machine((12, 0), (13, 0), "NVIDIA GeForce RTX 5090")


def test_bytes_are_those_of_the_tensors():
    weights = MoEWeights.empty(SMALL, "cpu")
    packed = sum(t.nbytes for t in (weights.w13, weights.w13_scale, weights.w2, weights.w2_scale))
    assert memory.packed_bytes(SMALL) == packed
    dense = Upcast(SMALL).prepare(weights)
    assert memory.upcast_bytes(SMALL) == dense["w13"].nbytes + dense["w2"].nbytes


def test_free_bytes_are_within_the_machine():
    assert (
        0 < memory.free_bytes() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") or torch.cuda.is_available()
    )


@pytest.mark.parametrize("capability", [(12, 0), (12, 1), (13, 0)])
def test_upcast_is_refused_on_sm120_and_newer(monkeypatch, capability):
    monkeypatch.delenv("MXFP4_SM120_FORCE_UPCAST", raising=False)
    monkeypatch.setattr(memory, "free_bytes", lambda: 23_456_789_012)
    assert Upcast.why_not(Machine(capability, (13, 0)), GPT_OSS_20B) == (
        "a full upcast takes 1,592,524,800 bytes for every layer (packed: 423,014,400) and 23,456,789,012 are free: "
        "refused on SM120 and newer; MXFP4_SM120_FORCE_UPCAST=1 allows it"
    )


@pytest.mark.parametrize("machine", [Machine(None, None), Machine((9, 0), (12, 8)), Machine((10, 3), (13, 0))])
def test_upcast_may_run_elsewhere(monkeypatch, machine):
    monkeypatch.delenv("MXFP4_SM120_FORCE_UPCAST", raising=False)
    assert Upcast.why_not(machine, GPT_OSS_20B) is None


def test_upcast_can_be_forced(monkeypatch):
    monkeypatch.setenv("MXFP4_SM120_FORCE_UPCAST", "1")
    assert Upcast.why_not(RTX_5090, GPT_OSS_20B) is None


def test_an_upcast_that_does_not_fit_is_warned_about(monkeypatch, caplog):
    monkeypatch.setattr(memory, "free_bytes", lambda: 1000)
    monkeypatch.setattr(memory.logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        memory.warn_upcast(SMALL)
    assert caplog.messages == ["upcasting a layer's experts takes 110,592 bytes and only 1,000 are free"]
    caplog.clear()
    monkeypatch.setattr(memory, "free_bytes", lambda: 110_592)
    memory.warn_upcast(SMALL)
    assert caplog.messages == []


SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "VLLM_FLOAT32_MATMUL_PRECISION")


@pytest.fixture
def cuda_build(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in SETTINGS:
        monkeypatch.setenv(name, "")  # so that what a test sets is taken back
        monkeypatch.delenv(name)


def settings() -> dict[str, str]:
    return {name: os.environ[name] for name in SETTINGS if name in os.environ}


def test_torch_is_configured_once(cuda_build, monkeypatch):
    memory.configure_torch()
    expected = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "VLLM_FLOAT32_MATMUL_PRECISION": "high"}
    assert settings() == expected
    memory.configure_torch()
    assert settings() == expected


def test_several_gpus_share_buffers_that_expandable_segments_cannot(cuda_build, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    memory.configure_torch()
    assert settings() == {"VLLM_FLOAT32_MATMUL_PRECISION": "high"}


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_the_users_own_settings_stay(cuda_build, monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:128")
    monkeypatch.setenv("VLLM_FLOAT32_MATMUL_PRECISION", "highest")
    memory.configure_torch()
    assert settings() == {name: "max_split_size_mb:128", "VLLM_FLOAT32_MATMUL_PRECISION": "highest"}


def test_a_cpu_build_is_left_alone(cuda_build, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    memory.configure_torch()
    assert settings() == {}


@pytest.mark.parametrize(
    ("settings", "meanwhile"),
    [
        ("max_split_size_mb:20", ""),
        ("expandable_segments:True,max_split_size_mb:20", "expandable_segments:True"),
        ("max_split_size_mb:20, roundup_power2_divisions:[256:1,>:2]", "roundup_power2_divisions:[256:1,>:2]"),
    ],
)
def test_freed_blocks_are_used_again_for_a_while(monkeypatch, settings, meanwhile):
    """What vLLM set is set again afterwards, also after an error, and other settings never go."""
    told = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: settings, raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append, raising=False)
    with pytest.raises(ZeroDivisionError), memory.reused_blocks():
        assert told == [meanwhile]
        1 / 0  # noqa: B018
    assert told == [meanwhile, settings]
