# SPDX-License-Identifier: Apache-2.0
"""The FlashInfer backend without FlashInfer; tests/packaging tries it with real ones."""

import sys
from importlib import metadata

import pytest
import torch

from vllm_mxfp4_sm120.backends import flashinfer_trtllm as backend
from vllm_mxfp4_sm120.moe import MoEShape
from vllm_mxfp4_sm120.platform import Machine

GPT_OSS = MoEShape(32, 32, 2880, 2880, 4)
B200, RTX5090 = Machine((10, 0), (13, 0), "B200"), Machine((12, 0), (13, 0), "RTX 5090")


def why_not(monkeypatch, found, machine=B200, shape=GPT_OSS):
    def version(name):
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(backend.metadata, "version", version)
    monkeypatch.setattr(backend, "_import_error", lambda: None)
    return backend.FlashInferTrtllm.why_not(machine, shape)


def test_why_not(monkeypatch):
    h100 = Machine((9, 0), (13, 0), "H100")
    assert why_not(monkeypatch, "0.7.2", h100) == "its kernels are for SM 10.x, this is sm_90"
    assert why_not(monkeypatch, None) == "FlashInfer is not installed (pip install flashinfer-python)"
    assert why_not(monkeypatch, "0.6.9") == "FlashInfer 0.6.9 is too old, 0.6.14 or newer is needed"
    assert why_not(monkeypatch, "0.6.14") is None
    assert why_not(monkeypatch, "0.7.2.post1", RTX5090) == (
        "FlashInfer 0.7.2.post1 has these kernels for SM 10.x only, none for sm_120"
    )
    assert why_not(monkeypatch, "0.7.10", RTX5090) is None  # not known to lack them: may prove itself
    assert why_not(monkeypatch, "0.7.2", shape=MoEShape(30, 30, 2880, 2880, 4)) == (
        "it routes to multiples of 4 experts and up to 32 of them, not to 4 of 30"
    )


@pytest.mark.parametrize(
    "module, reason",
    [
        ("raise RuntimeError('no libcuda')", "FlashInfer doesn't import: RuntimeError: no libcuda"),
        (
            "__version__ = '0.9.0'; trtllm_fp4_block_scale_moe = print",
            "FlashInfer 0.9.0 has no trtllm_fp4_block_scale_routed_moe",
        ),
    ],
)
def test_a_broken_flashinfer_is_a_reason(module, reason, tmp_path, monkeypatch):
    (tmp_path / "flashinfer.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flashinfer", raising=False)
    backend._import_error.cache_clear()
    assert backend._import_error() == reason
    backend._import_error.cache_clear()
    sys.modules.pop("flashinfer", None)


def test_scales_are_checked():
    with pytest.raises(
        ValueError, match=r"^block scales are torch.float32 \[4, 4\], expected uint8 \[rows, columns\]$"
    ):
        backend.interleave_scales(torch.zeros(4, 4))


def test_90_scale_columns_become_92():
    flat = backend.interleave_scales(torch.ones(128, 90, dtype=torch.uint8))
    assert flat.numel() == 128 * 92 and flat.dtype == torch.uint8 and flat.is_contiguous()
    assert int(flat.sum()) == 128 * 90  # the padding is zeros
