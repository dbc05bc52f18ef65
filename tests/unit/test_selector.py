# SPDX-License-Identifier: Apache-2.0
"""Which backend answers: machines x installed packages x settings, with every reason in full."""

import pytest
import torch
from machines import GPT_OSS, NO_SM120, NO_TRITON, NOT_BUILT, install, machine

from tests.support.layers import random_weights
from vllm_mxfp4_sm120 import proof, selector, settings
from vllm_mxfp4_sm120.backends import registry
from vllm_mxfp4_sm120.moe import MoEShape


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("BACKEND", "USE_TRITON", "DISABLE_TRITON_MOE", "PROOF", "BASE_GPU_ID", "FORCE_UPCAST", "WEIGHTONLY"):
        monkeypatch.delenv(f"MXFP4_SM120_{name}", raising=False)
    yield
    selector.select.cache_clear()


FAIL_FI = {"flashinfer_trtllm": "no answer within 180 s (MXFP4_SM120_PROOF_SECONDS)"}
FAIL_NATIVE = {"native": "its process died (killed by SIGSEGV): it said nothing"}

# machine, installed, environment, --moe-backend, --additional-config -> the whole line that goes to the log
CHOSEN = [
    ("RTX 5090", {}, {}, None, {},
     "MXFP4 experts on RTX 5090 (sm_120): native"),
    ("RTX 5090", {"flashinfer": "0.7.2"}, {}, None, {},
     "MXFP4 experts on RTX 5090 (sm_120): native"),
    ("RTX 5090", {"flashinfer": "0.8.0"}, {}, None, {}, "MXFP4 experts on RTX 5090 (sm_120): flashinfer_trtllm"),
    ("RTX 5090", {"flashinfer": "0.8.0", "failing": FAIL_FI}, {}, None, {},
     "MXFP4 experts on RTX 5090 (sm_120): native; not flashinfer_trtllm: "
     "no answer within 180 s (MXFP4_SM120_PROOF_SECONDS)"),
    ("RTX 5090", {"library": None}, {}, None, {},
     f"MXFP4 experts on RTX 5090 (sm_120): triton; not native: {NOT_BUILT}"),
    ("RTX 5090", {"library": None}, {"DISABLE_TRITON_MOE": "1"}, None, {},
     f"MXFP4 experts on RTX 5090 (sm_120): tiled; not native: {NOT_BUILT}; "
     "not triton: switched off (disable_triton_moe)"),
    ("RTX 5090", {"library": None, "has_triton": False}, {}, None, {},
     f"MXFP4 experts on RTX 5090 (sm_120): tiled; not native: {NOT_BUILT}; "
     f"not triton: {NO_TRITON}"),
    ("RTX 5090", {}, {"USE_TRITON": "1"}, None, {}, "MXFP4 experts on RTX 5090 (sm_120): triton"),
    ("RTX 5090", {"has_triton": False}, {"USE_TRITON": "1"}, None, {},
     f"MXFP4 experts on RTX 5090 (sm_120): native; not triton: {NO_TRITON}"),
    ("RTX 5090", {"library": "80-real 90-real"}, {}, None, {},
     "MXFP4 experts on RTX 5090 (sm_120): triton; not native: _native.so is "
     "built for 80-real 90-real, not for sm_120: run mxfp4-sm120 build"),
    ("RTX PRO 6000", {"failing": FAIL_NATIVE}, {}, None, {},
     "MXFP4 experts on RTX PRO 6000 (sm_120): triton; not native: "
     "its process died (killed by SIGSEGV): it said nothing"),
    ("RTX PRO 6000", {"failing": FAIL_NATIVE}, {"PROOF": "0"}, None, {},
     "MXFP4 experts on RTX PRO 6000 (sm_120): native"),
    ("GB10", {}, {}, None, {},
     "MXFP4 experts on GB10 (sm_121): native"),
    ("GB10", {}, {"BACKEND": "tiled"}, None, {},
     "MXFP4 experts on GB10 (sm_121): tiled, asked for by MXFP4_SM120_BACKEND"),
    ("B200", {"flashinfer": "0.6.14"}, {}, None, {}, "MXFP4 experts on B200 (sm_100): flashinfer_trtllm"),
    ("B200", {"flashinfer": "0.6.14"}, {"BACKEND": "flashinfer_trtllm_mxfp8"}, None, {},
     "MXFP4 experts on B200 (sm_100): flashinfer_trtllm_mxfp8, asked for by MXFP4_SM120_BACKEND"),
    ("B200", {"flashinfer": "0.6.9"}, {}, None, {},
     "MXFP4 experts on B200 (sm_100): native; not flashinfer_trtllm: FlashInfer 0.6.9 is too old, 0.6.14 or newer is "
     "needed"),
    ("B300", {"flashinfer": "0.7.2"}, {}, None, {}, "MXFP4 experts on B300 (sm_103): flashinfer_trtllm"),
    ("B300", {"flashinfer": "0.7.2"}, {}, None, {"mxfp4_sm120": {"backend": "native"}},
     "MXFP4 experts on B300 (sm_103): native, asked for by --additional-config mxfp4_sm120 backend"),
    ("H100", {"flashinfer": "0.7.2"}, {}, None, {}, "MXFP4 experts on H100 (sm_90): native"),
    ("H100", {}, {}, "triton", {}, "MXFP4 experts on H100 (sm_90): triton, asked for by --moe-backend"),
    ("H100", {}, {"BACKEND": "triton"}, "triton", {},
     "MXFP4 experts on H100 (sm_90): triton, asked for by --moe-backend"),
    ("H100", {}, {}, "auto", {"mxfp4_sm120": {"use_triton": True}}, "MXFP4 experts on H100 (sm_90): triton"),
    ("A100", {"library": None}, {}, None, {"mxfp4_sm120": {"disable_triton_moe": True}},
     f"MXFP4 experts on A100 (sm_80): tiled; not native: {NOT_BUILT}; "
     "not triton: switched off (disable_triton_moe)"),
    ("L40S", {}, {}, None, {}, "MXFP4 experts on L40S (sm_89): native"),
    ("Thor", {}, {}, None, {},
     "MXFP4 experts on Thor (sm_110): triton; not native: _native.so is built for 80-real 86-real 89-real 90-real "
     "100-real 120-real 120-virtual, not for sm_110: run mxfp4-sm120 build"),
    ("cpu", {}, {}, None, {}, "MXFP4 experts on cpu (cpu): tiled"),
    ("cpu", {}, {"USE_TRITON": "1"}, None, {},
     "MXFP4 experts on cpu (cpu): tiled; not triton: Triton needs an NVIDIA GPU"),
    ("H100", {}, {"WEIGHTONLY": "0"}, None, {},
     "MXFP4 experts on H100 (sm_90): upcast, asked for by MXFP4_SM120_WEIGHTONLY"),
    ("cpu", {}, {"BACKEND": "upcast"}, None, {},
     "MXFP4 experts on cpu (cpu): upcast, asked for by MXFP4_SM120_BACKEND"),
]  # fmt: skip


def decide(monkeypatch, name, installed, environment, moe_backend, config):
    install(monkeypatch, **installed)
    for variable, value in environment.items():
        monkeypatch.setenv(f"MXFP4_SM120_{variable}", value)
    return selector.select(machine(name), GPT_OSS, selector.Request.from_user(moe_backend, config))


@pytest.mark.parametrize("name, installed, environment, moe_backend, config, line", CHOSEN)
def test_chosen(monkeypatch, name, installed, environment, moe_backend, config, line):
    assert str(decide(monkeypatch, name, installed, environment, moe_backend, config)) == line


KEYS = ", ".join(setting.key for setting in settings.TABLE if setting.in_json)

REFUSED = [
    ("RTX 5090", {"flashinfer": "0.7.2"}, {}, "flashinfer_trtllm", {},
     f"--moe-backend asks for a backend that can't be used: flashinfer_trtllm: {NO_SM120}"),
    ("RTX 5090", {"flashinfer": "0.8.0", "failing": FAIL_FI}, {"BACKEND": "flashinfer_trtllm"}, None, {},
     "MXFP4_SM120_BACKEND asks for a backend that can't be used: flashinfer_trtllm: "
     "no answer within 180 s (MXFP4_SM120_PROOF_SECONDS)"),
    ("RTX 5090", {}, {"DISABLE_TRITON_MOE": "1"}, "triton", {},
     "--moe-backend asks for triton and MXFP4_SM120_DISABLE_TRITON_MOE forbids it; keep one of them"),
    ("RTX 5090", {}, {"DISABLE_TRITON_MOE": "1", "USE_TRITON": "1"}, None, {},
     "MXFP4_SM120_USE_TRITON asks for triton and MXFP4_SM120_DISABLE_TRITON_MOE forbids it; keep one of them"),
    ("RTX 5090", {}, {"BACKEND": "native"}, "triton", {},
     "contradicting backends: --moe-backend says triton, MXFP4_SM120_BACKEND says native; keep one of them"),
    ("RTX 5090", {}, {"BACKEND": "native", "WEIGHTONLY": "0"}, None, {},
     "contradicting backends: MXFP4_SM120_BACKEND says native, MXFP4_SM120_WEIGHTONLY says upcast; keep one of them"),
    ("RTX 5090, CUDA 12.6", {"flashinfer": "0.7.2"}, {}, None, {},
     "no MXFP4 backend for RTX 5090 (sm_120): " + "; ".join(
         f"{name}: torch is built for CUDA 12.6, RTX 5090 (sm_120) needs one for CUDA 12.8 or newer"
         for name in ("flashinfer_trtllm", "native", "triton", "tiled"))),
    ("T4", {}, {"BACKEND": "tiled"}, None, {},
     "MXFP4_SM120_BACKEND asks for a backend that can't be used: tiled: T4 (sm_75) has no BF16 tensor cores: "
     "a card of sm_80 or newer is needed"),
    ("H100", {"library": None}, {"BACKEND": "native"}, None, {},
     f"MXFP4_SM120_BACKEND asks for a backend that can't be used: native: {NOT_BUILT}"),
    ("H100", {"flashinfer": "0.7.2"}, {}, "flashinfer_trtllm", {},
     "--moe-backend asks for a backend that can't be used: flashinfer_trtllm: "
     "its kernels are for SM 10.x, this is sm_90"),
    ("H100", {}, {}, "marlin", {},
     "--moe-backend marlin is not a backend of mxfp4_sm120 (auto, flashinfer_trtllm, triton): "
     "for vLLM's own use --quantization gpt_oss_mxfp4 --moe-backend marlin"),
    ("cpu", {}, {}, "triton", {},
     "--moe-backend asks for a backend that can't be used: triton: Triton needs an NVIDIA GPU"),
    ("cpu", {}, {"BACKEND": "fast"}, None, {},
     "MXFP4_SM120_BACKEND='fast' is not accepted: expected one of auto, flashinfer_trtllm, flashinfer_trtllm_mxfp8, "
     "native, triton, tiled, upcast"),
    ("cpu", {}, {}, None, {"mxfp4_sm120": {"backend": "fast"}},
     "--additional-config mxfp4_sm120 backend is 'fast', expected one of auto, flashinfer_trtllm, "
     "flashinfer_trtllm_mxfp8, native, triton, tiled, upcast"),
    ("cpu", {}, {}, None, {"mxfp4_sm120": {"backends": "tiled"}},
     f"--additional-config mxfp4_sm120 has 'backends', expected one of {KEYS}"),
    ("cpu", {}, {}, None, {"mxfp4_sm120": {"proof": "no"}},
     "--additional-config mxfp4_sm120 proof is 'no', expected true or false"),
    ("cpu", {}, {}, None, {"mxfp4_sm120": "tiled"},
     f"--additional-config mxfp4_sm120 is 'tiled', expected an object of {KEYS}"),
]  # fmt: skip


@pytest.mark.parametrize("name, installed, environment, moe_backend, config, line", REFUSED)
def test_refused(monkeypatch, name, installed, environment, moe_backend, config, line):
    with pytest.raises(ValueError) as refused:
        decide(monkeypatch, name, installed, environment, moe_backend, config)
    assert str(refused.value) == line


def test_every_backend_is_found_by_its_name():
    for name in registry.NAMES:
        assert registry.load(name).name == name


def test_upcast_is_never_chosen_by_itself():
    assert not registry.find("upcast").automatic
    assert all("upcast" not in registry.automatic(family) for family in range(0, 200, 10))


def test_a_decision_is_made_once(monkeypatch):
    install(monkeypatch)
    proofs = []
    monkeypatch.setattr(proof, "why_not", lambda backend, machine, shape: proofs.append(backend.name))
    for _ in range(24):
        selector.select(machine("H100"), GPT_OSS)
    assert proofs == ["native"]


SMALL = MoEShape(4, 4, 64, 96, 2)
LAYER = "model.layers.3.mlp.experts"


def loaded_with(scale, codes=0x11):
    """Loaded weights, one block of which has that scale and those codes."""
    weights = random_weights(SMALL, "cpu")
    weights.w2_scale[3, 5] = torch.tensor([118, scale, 118], dtype=torch.uint8)
    weights.w2[3, 5, 16:32] = codes
    return weights


TO_TRITON = f"triton; not native: {LAYER}.down_proj_scales[3, 5, 1] is {{}}, the native backend takes 43 to 176"
TO_TILED = f"{TO_TRITON.removeprefix('triton').format(252)}; not triton: {LAYER}.down_proj_scales[3] are 118 to 252, " \
           "the triton backend takes up to 252, no two in an expert more than 133 apart"  # fmt: skip


@pytest.mark.parametrize("weights, line", [
    (loaded_with(43), "native"), (loaded_with(176), "native"),
    (loaded_with(0, codes=0), "native"), (loaded_with(254, codes=0x88), "native"),
    (loaded_with(42), TO_TRITON.format(42)), (loaded_with(0), TO_TRITON.format(0)),
    (loaded_with(177), TO_TRITON.format(177)), (loaded_with(252), f"tiled{TO_TILED}"),
])  # fmt: skip
def test_weights_outside_a_backends_range_go_to_the_next(monkeypatch, weights, line):
    install(monkeypatch)
    choice = selector.select(machine("H100"), SMALL)
    choice = selector.fall_through(choice, SMALL, weights, layer=LAYER)
    assert str(choice) == f"MXFP4 experts on H100 (sm_90): {line}"


def test_the_next_backend_must_prove_itself_too(monkeypatch):
    install(monkeypatch, failing={"triton": "wrong numbers"})
    choice = selector.fall_through(selector.select(machine("H100"), SMALL), SMALL, loaded_with(42))
    assert choice.backend.name == "tiled" and str(choice).endswith("; not triton: wrong numbers")


def test_weights_that_nothing_takes(monkeypatch):
    install(monkeypatch)
    choice = selector.select(machine("cpu"), SMALL)
    with pytest.raises(ValueError, match=r"^no MXFP4 .*: tiled: down_proj_scales\[3, 5, 1\] is 254, .* 0 to 252$"):
        selector.fall_through(choice, SMALL, loaded_with(254))
    for codes in (0, 0x11):  # NaN times zero is NaN
        with pytest.raises(ValueError, match=r"^L\.down_proj_scales\[3, 5, 1\] is 255 \(NaN\), expected 0 to 254"):
            selector.fall_through(choice, SMALL, loaded_with(255, codes), layer="L")
    request = selector.Request("native", "MXFP4_SM120_BACKEND")
    choice = selector.select(machine("H100"), SMALL, request)
    with pytest.raises(ValueError, match=r"^MXFP4_SM120_BACKEND asks for a backend that can't be used: native: d"):
        selector.fall_through(choice, SMALL, loaded_with(42), request)
