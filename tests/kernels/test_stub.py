# SPDX-License-Identifier: Apache-2.0
"""The library without GPU code, what the ops do around the kernels, and where nothing can be built."""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path

import pytest

from tests.kernels.building import KERNELS, in_a_new_process, run


def test_the_stub_computes_nothing_unless_allowed(stub: Path):
    code = """
print(Native.why_not(Machine(None, None), shape))
backend = Native(shape)
print(backend.forward_logits(backend.prepare(MoEWeights.empty(shape, "cpu")), x, logits).abs().sum().item())
"""
    refused = in_a_new_process(stub, code)
    assert "it is a stub without GPU code" in refused.stdout
    assert "it is a stub without GPU code" in refused.stderr.splitlines()[-1]
    unasked = in_a_new_process(stub, "library.load = library._load" + code)
    assert "this library is the stub, which computes nothing" in unasked.stderr.splitlines()[-1]
    for _ in range(2):
        allowed = in_a_new_process(stub, code, MXFP4_SM120_ALLOW_STUB_KERNEL="1")
        assert allowed.stdout.split() == ["None", "0.0"], allowed.stderr
        assert "is a stub: its output is zeros, never an answer" in allowed.stderr


AROUND = """
from vllm_mxfp4_sm120.backends.native import fp4
library.load()
inf, op, ops = float("inf"), torch.ops.mxfp4_sm120.moe_layer, torch.ops.mxfp4_sm120
layer = Native(shape)
prepared = layer.prepare(MoEWeights.empty(shape, "cpu"))
arguments = dict(
    x=x, **prepared, router_logits=logits, topk_ids=None, topk_weights=None, expert_map=None, num_experts=4, top_k=2,
    swiglu_oai=True, config=-1,
)
assert [config.name for config in library.configurations()] == ["zeros", "zeros8"]
many = {"x": x.repeat(4, 1), "router_logits": logits.repeat(4, 1)}
def refusal(op=op, **changes):
    try:
        op(**{**arguments, **changes})
    except RuntimeError as error:
        return str(error)
print(refusal(config=1), refusal(config=1, **many))
for index, config in enumerate(library.configurations()):  # Python's view of the limits is the library's
    for tokens in (3, 12):
        call = {name: tensor[:tokens] for name, tensor in many.items()}
        assert (refusal(config=index, **call) is None) == config.takes(tokens, 2, 64)
print(fp4.configurations(), [ops.fp4_architectures()], "has no FP4 kernels" in fp4.why_not((12, 0)))
print(refusal(ops.fp4_moe_layer, config=0))
print(refusal(config=2))
print(refusal(x=x.float()))
print(refusal(w2=prepared["w2"].view(torch.int8)))
print(refusal(router_logits=logits.half()))
print(refusal(router_logits=None))
ops.set_rule(-1, [1], [inf], [inf])
print(refusal(), refusal(**many))
ops.set_rule(-1, [1, 0], [8, inf], [inf, inf])
print(refusal(), refusal(**many))
ops.set_rule(-1, [0], [8], [inf])
print(refusal(**many))
ops.set_rule(-1, [0], [inf], [inf])
long = op(**{**arguments, "x": x.repeat(3000, 1), "router_logits": logits.repeat(3000, 1)})
print(tuple(long.shape), int(long.count_nonzero()))
for tokens in (0, 3):
    torch.library.opcheck(op.default, (), {**arguments, "x": x[:tokens], "router_logits": logits[:tokens]})
weight = torch.ones(4, 64, dtype=torch.bfloat16)
torch.library.opcheck(ops.router_logits.default, (x, weight, None))
assert torch.equal(ops.router_logits(x.repeat(30, 1), weight, None), torch.full((90, 4), 64.0).bfloat16())
def doubled(x):
    return layer.forward_logits(prepared, x * 2, logits) + 1
compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
print(bool((compiled(x) == 1).all()))
"""


def test_around_the_kernels(stub: Path):
    """What the ops do but compute, which the stub does too: the rule, refusals that name what is wrong, compiling."""
    result = in_a_new_process(stub, AROUND, MXFP4_SM120_ALLOW_STUB_KERNEL="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "None mxfp4_sm120: config zeros8 takes up to 8 tokens, not 12",
        "() [''] True",  # as in a library that is built for other cards, or by an older nvcc
        "mxfp4_sm120: fp4_moe_layer isn't in this library, expected one built for SM 12.x by nvcc 12.8 or newer",
        "mxfp4_sm120: config is 2, expected 0 to 1, or -1 for the rule's",
        "mxfp4_sm120: x is float32, expected bfloat16",
        "mxfp4_sm120: w2 is int8, expected uint8",
        "mxfp4_sm120: router_logits is float16, expected bfloat16 or float32",
        "mxfp4_sm120: router_logits and topk_ids are both missing, expected one",
        "None mxfp4_sm120: the rule of device -1 leaves out 12 tokens, 6.000000 an expert",
        "None None",
        "mxfp4_sm120: the rule of device -1 leaves out 12 tokens, 6.000000 an expert",
        "(9000, 64) 0",
        "True",
    ]


def test_a_library_that_cannot_be_loaded_is_a_reason(tmp_path: Path):
    broken = tmp_path / "_native.so"
    broken.write_text("no library")
    result = in_a_new_process(broken, "print(Native.why_not(Machine((9, 0), (13, 0)), shape))")
    assert result.stdout.startswith("_native.so can't be used: "), result.stderr


def test_without_a_compiler_the_installation_fails_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    for name in ("CUDACXX", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shutil, "which", lambda *arguments, **options: None)
    setup = runpy.run_path(str(KERNELS / "setup.py"))
    monkeypatch.setenv("MXFP4_SM120_BUILD", "1")
    with pytest.raises(SystemExit, match=r"install g\+\+ .*MXFP4_SM120_BUILD=0"):
        setup["requirements"]()
    monkeypatch.setenv("MXFP4_SM120_BUILD", "0")
    assert setup["requirements"]() == [] and not setup["wanted"]()


@pytest.mark.parametrize("how", ["FLASHINFER_DIR", "import flashinfer"])
def test_flashinfer_is_found(library: Path, tmp_path: Path, how: str):
    package = tmp_path / "flashinfer"
    for part in ("include", "csrc", "cutlass/include", "cutlass/tools/util/include"):
        (package / "data" / part).mkdir(parents=True)
    (package / "__init__.py").touch()
    where = {"FLASHINFER_DIR": str(package)} if how == "FLASHINFER_DIR" else {"PYTHONPATH": str(tmp_path)}
    configure = ("cmake", "-S", KERNELS, "-B", tmp_path / "build", "-DMXFP4_SM120_KIND=cutlass")
    said = run(*configure, f"-DPython3_EXECUTABLE={sys.executable}", **where)
    assert f"FlashInfer's headers: {package}/data ({how})" in said.stdout
    assert "cutlass for 120a-real" in said.stdout


def test_a_flashinfer_without_headers_is_named(tmp_path: Path):
    environment = {"PYTHON": sys.executable, "FLASHINFER_DIR": str(tmp_path)}
    said = run("bash", KERNELS / "build.sh", "--cutlass", check=False, **environment)
    assert said.returncode != 0
    assert f"FLASHINFER_DIR gives {tmp_path}, which has no data/include" in " ".join(said.stderr.split())


def test_an_unknown_option_is_refused():
    said = run("bash", KERNELS / "build.sh", "--sm120", check=False)
    assert said.returncode == 2 and "'--sm120' is not an option" in said.stderr


def test_around_the_dense_kernels(stub: Path):
    """Refusals that name what is wrong, compiling."""
    result = in_a_new_process(
        stub,
        """
from vllm_mxfp4_sm120.dense import native
from vllm_mxfp4_sm120.dense.int8 import Int8Weights
library.load()
weight, bias = torch.ones(5, 64, dtype=torch.bfloat16), torch.ones(5, dtype=torch.bfloat16)
encoded = Int8Weights.quantize(weight)
codes, scale = encoded.codes, encoded.scales
def refusal(*arguments):
    try:
        native.linear(*arguments)
    except RuntimeError as error:
        return str(error)
print(native.limits())
print(refusal(x.repeat(100, 1), weight))
print(refusal(x[:, :48].contiguous(), weight))
print(refusal(x, weight.float()))
print(refusal(x, codes))
print(refusal(x, weight, None, scale))
print(refusal(x, codes, None, scale.T.contiguous()))
print(refusal(x, weight[:, :32].contiguous()))
print(refusal(x, weight, bias[:4]))
print(refusal(x, weight, bias, None, 3))
print(refusal(x, codes, bias, scale, -2))
print(refusal(x, weight, bias, None, 1))
print(native.dequantize(codes, scale).shape)
print(native.linear(x.repeat(9, 1), codes, bias, scale, 2).shape)
op = torch.ops.mxfp4_sm120.dense_linear.default
for tokens in (0, 3):
    torch.library.opcheck(op, (x[:tokens], weight, None, bias))
    torch.library.opcheck(op, (x[:tokens], codes, scale, None, 2))
compiled = torch.compile(lambda x: native.linear(x * 2, codes, bias, scale) + 1, fullgraph=True, backend="aot_eager")
print(bool((compiled(x) == 1).all()), tuple(compiled(x).shape))
""",
        MXFP4_SM120_ALLOW_STUB_KERNEL="1",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "Limits(tokens=256, k_multiple=64)",
        "mxfp4_sm120: x has 300 tokens, expected at most 256",
        "mxfp4_sm120: x has 48 columns, expected a multiple of 64 up to 65536",
        "mxfp4_sm120: weight is float32, expected bfloat16 or int8",
        "mxfp4_sm120: scale is missing, expected with int8 weights and only then",
        "mxfp4_sm120: scale is given, expected with int8 weights and only then",
        "mxfp4_sm120: scale has shape [2, 5, 1], expected [1, 5, 2]",
        "mxfp4_sm120: weight has shape [5, 32], expected [5, 64]",
        "mxfp4_sm120: bias has shape [4], expected [5]",
        "mxfp4_sm120: config is 3, expected 0 to 2, or -1 for the first that fits",
        "mxfp4_sm120: config is -2, expected 0 to 2, or -1 for the first that fits",
        "mxfp4_sm120: config is 1, expected another: int8_zeros takes int8 weights, not bfloat16",
        "torch.Size([5, 64])",
        "torch.Size([27, 5])",
        "True (3, 5)",
    ]
