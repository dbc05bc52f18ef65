# SPDX-License-Identifier: Apache-2.0
"""Machines that aren't here, and what is pretended to be installed on them."""

from types import SimpleNamespace

from vllm_mxfp4_sm120 import config_path, proof, selector
from vllm_mxfp4_sm120.backends import flashinfer_trtllm, triton, tuning
from vllm_mxfp4_sm120.backends.native import fp4
from vllm_mxfp4_sm120.backends.native import library as native_library
from vllm_mxfp4_sm120.moe import MoEShape
from vllm_mxfp4_sm120.platform import Machine, parse_cuda

GPT_OSS = MoEShape(32, 32, 2880, 2880, 4)
EVERY_CARD = "80-real 86-real 89-real 90-real 100-real 120-real 120-virtual"

# What the reasons say, so that the table below can be read.
NOT_BUILT = "the CUDA library isn't built: run mxfp4-sm120 build"
NO_FLASHINFER = "FlashInfer is not installed (pip install flashinfer-python)"
NO_TRITON = "Triton is not installed"
NO_SM120 = "FlashInfer 0.7.2 has these kernels for SM 10.x only, none for sm_120"


def machine(name):
    capability, cuda = {
        "RTX 5090": ((12, 0), "12.8"),
        "RTX PRO 6000": ((12, 0), "13.0"),
        "GB10": ((12, 1), "13.0"),
        "B200": ((10, 0), "12.8"),
        "B300": ((10, 3), "13.0"),
        "H100": ((9, 0), "12.8"),
        "A100": ((8, 0), "12.8"),
        "L40S": ((8, 9), "12.8"),
        "Thor": ((11, 0), "13.0"),
        "T4": ((7, 5), "12.8"),
        "RTX 5090, CUDA 12.6": ((12, 0), "12.6"),
        "cpu": (None, None),
    }[name]
    return Machine(capability, parse_cuda(cuda), name.partition(",")[0])


def install(monkeypatch, flashinfer=None, has_triton=True, library=EVERY_CARD, failing=()):
    """Pretend that these are installed, and that the backends `failing` fail their proof, with that reason."""

    def version(name):
        if flashinfer is None:
            raise flashinfer_trtllm.metadata.PackageNotFoundError(name)
        return flashinfer

    monkeypatch.setattr(
        flashinfer_trtllm,
        "metadata",
        SimpleNamespace(version=version, PackageNotFoundError=flashinfer_trtllm.metadata.PackageNotFoundError),
    )
    monkeypatch.setattr(flashinfer_trtllm, "_import_error", lambda: None)
    monkeypatch.setattr(triton, "triton", SimpleNamespace() if has_triton else None)
    monkeypatch.setattr(native_library, "LIBRARY", SimpleNamespace(name="_native.so", exists=lambda: bool(library)))
    monkeypatch.setattr(native_library, "cached", lambda capability: None)
    monkeypatch.setattr(native_library, "load", lambda: library)
    monkeypatch.setattr(fp4, "architectures", lambda: "")
    rule = tuning.read(config_path("tuning", "default.json"))
    table = [native_library.Configuration(bound.kernel, 8192, 7168, 2**31 - 1, 128, 1024) for bound in rule]
    monkeypatch.setattr(native_library, "configurations", lambda: table)
    monkeypatch.setattr(native_library, "limits", lambda: native_library.Limits(256, 8, 7168, 8192, 64))
    monkeypatch.setattr(proof, "why_not", lambda backend, machine, shape: dict(failing).get(backend.name))
    selector.select.cache_clear()
