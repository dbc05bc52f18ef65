# SPDX-License-Identifier: Apache-2.0
"""What a machine is and which torch it needs, over a table of machines that aren't here."""

import pytest
import torch

from vllm_mxfp4_sm120 import platform, selector
from vllm_mxfp4_sm120.platform import Machine, is_sm90_supported, is_sm100_supported, is_sm120_supported, parse_cuda

MACHINES = [  # capability, CUDA of torch, family, sm, why unsupported
    ((12, 0), "12.8", 120, "sm_120", None),
    ((12, 0), "13.0", 120, "sm_120", None),
    ((12, 0), "12.10", 120, "sm_120", None),
    ((12, 0), "12.6", 120, "sm_120", "torch is built for CUDA 12.6, card (sm_120) needs one for CUDA 12.8 or newer"),
    ((12, 0), None, 120, "sm_120", "torch is a CPU build, card (sm_120) needs one for CUDA 12.8 or newer"),
    ((12, 1), "12.9", 120, "sm_121", None),
    ((12, 1), "12.8", 120, "sm_121", "torch is built for CUDA 12.8, card (sm_121) needs one for CUDA 12.9 or newer"),
    ((12, 7), "13.0", 120, "sm_127", None),
    ((12, 7), "12.8", 120, "sm_127", "torch is built for CUDA 12.8, card (sm_127) needs one for CUDA 12.9 or newer"),
    ((10, 0), "12.8", 100, "sm_100", None),
    ((10, 0), "12.4", 100, "sm_100", "torch is built for CUDA 12.4, card (sm_100) needs one for CUDA 12.8 or newer"),
    ((10, 3), "12.9", 100, "sm_103", None),
    ((10, 3), "12.8", 100, "sm_103", "torch is built for CUDA 12.8, card (sm_103) needs one for CUDA 12.9 or newer"),
    ((9, 0), "12.8", 90, "sm_90", None),
    ((9, 0), "11.7", 90, "sm_90", "torch is built for CUDA 11.7, card (sm_90) needs one for CUDA 11.8 or newer"),
    ((8, 9), "12.8", 80, "sm_89", None),
    ((8, 6), "12.8", 80, "sm_86", None),
    ((8, 0), "11.0", 80, "sm_80", None),
    ((11, 0), "13.0", 110, "sm_110", None),
    ((7, 5), "12.8", 70, "sm_75", "card (sm_75) has no BF16 tensor cores: a card of sm_80 or newer is needed"),
    (None, None, 0, "cpu", None),
    (None, "13.0", 0, "cpu", None),
]


@pytest.mark.parametrize("capability, cuda, family, sm, reason", MACHINES)
def test_machines(capability, cuda, family, sm, reason):
    machine = Machine(capability, parse_cuda(cuda), "card")
    assert (machine.family, machine.sm, machine.why_unsupported()) == (family, sm, reason)
    for wanted, supported in ((120, is_sm120_supported), (100, is_sm100_supported), (90, is_sm90_supported)):
        assert supported(machine) == (family == wanted and reason is None)


def test_cuda_versions_compare_as_numbers():
    assert parse_cuda("12.10") > parse_cuda("12.8") > parse_cuda("12.8")[:1]
    assert parse_cuda("13.0") == (13, 0) and parse_cuda("12.8.1") == (12, 8, 1)
    assert parse_cuda(None) is None


def pretend(monkeypatch, initialized=False, cards=((9, 0), (12, 0))):
    """A torch that sees these cards, the second of them current."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.version, "hip", None)
    for name, value in {
        "is_available": True,
        "is_initialized": initialized,
        "current_device": 1,
        "device_count": len(cards),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: cards[device])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device}")


def test_here(monkeypatch):
    monkeypatch.delenv("MXFP4_SM120_BASE_GPU_ID", raising=False)
    pretend(monkeypatch)
    assert selector.this_machine() == Machine.here() == Machine((9, 0), (12, 8), "card 0")
    assert Machine.here(1) == Machine((12, 0), (12, 8), "card 1")
    assert is_sm90_supported() and not is_sm120_supported()
    monkeypatch.setenv("MXFP4_SM120_BASE_GPU_ID", "1")
    assert selector.this_machine() == Machine((12, 0), (12, 8), "card 1")
    monkeypatch.setenv("MXFP4_SM120_BASE_GPU_ID", "2")
    with pytest.raises(ValueError, match=r"^MXFP4_SM120_BASE_GPU_ID=2: GPU 2 isn't there: .* GPUs 0 to 1$"):
        selector.this_machine()


def test_here_takes_the_processs_own_gpu_once_it_has_one(monkeypatch):
    monkeypatch.setenv("MXFP4_SM120_BASE_GPU_ID", "0")
    pretend(monkeypatch, initialized=True)
    assert Machine.here().name == "card 1"


def test_here_without_an_nvidia_gpu(monkeypatch):
    pretend(monkeypatch)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert Machine.here() == Machine(None, (12, 8), "cpu")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Machine.here() == Machine(None, None, "cpu")


def test_driver(monkeypatch):
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder)"
    monkeypatch.setattr(platform.Path, "read_text", lambda self: text)
    assert platform.driver() == "580.95.05"

    def missing(self):
        raise FileNotFoundError

    monkeypatch.setattr(platform.Path, "read_text", missing)
    assert platform.driver() is None
