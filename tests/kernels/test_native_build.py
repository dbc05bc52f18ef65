# SPDX-License-Identifier: Apache-2.0
"""The CUDA library without a GPU: what it is compiled for and how it loads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.kernels.building import KERNELS, in_a_new_process, run
from vllm_mxfp4_sm120.backends import tuning
from vllm_mxfp4_sm120.backends.native import library as native_library


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0;9.0 12.0+PTX", "80-real;90-real;120-real;120-virtual"),
        ("12.0a", "120a-real"),
        ("12.0f", "120f-real"),
        ("Blackwell", "100-real;103-real;120-real;121-real;121-virtual"),
        ("Hopper 9.0", "90-real;90-virtual"),
        ("8.9,12.1", "89-real;121-real"),
    ],
)
def test_torch_s_architecture_list(text: str, expected: str):
    assert architectures(TORCH_CUDA_ARCH_LIST=text) == expected


def test_cmake_s_own_choice_comes_first():
    assert architectures(TORCH_CUDA_ARCH_LIST="9.0", CMAKE_CUDA_ARCHITECTURES="120a;89-real") == "120a;89-real"
    said = run(
        "cmake", "-DCMAKE_CUDA_ARCHITECTURES=86", "-P", KERNELS / "architectures.cmake", TORCH_CUDA_ARCH_LIST="9.0"
    )
    assert said.stderr.strip() == "86"


@pytest.mark.parametrize("text", ["7.5", "12", "sm_120", "9.0 Volta", ";"])
def test_an_architecture_that_cannot_be_is_refused(text: str):
    said = run("cmake", "-P", KERNELS / "architectures.cmake", check=False, TORCH_CUDA_ARCH_LIST=text)
    assert said.returncode != 0
    assert "expected" in said.stderr and text.split()[-1] in said.stderr


def test_the_default_is_one_binary_for_all(library: Path):
    expected = "80-real;89-real;90-real;100-real;120-real;121-real;121-virtual"
    assert architectures(TORCH_CUDA_ARCH_LIST="", CMAKE_CUDA_ARCHITECTURES="") == expected


def architectures(**environment: str) -> str:
    return run("cmake", "-P", KERNELS / "architectures.cmake", **environment).stderr.strip()


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("80-real 90-real", (8, 6), True),
        ("80-real 90-real", (9, 0), True),
        ("80-real 90-real", (12, 0), False),
        ("120-real", (12, 1), True),
        ("121-real", (12, 0), False),
        ("120a-real", (12, 0), True),
        ("120a-real", (12, 1), False),
        ("120a-real 121a-real", (12, 1), True),
        ("120f-real", (12, 0), True),
        ("120f-real", (12, 1), True),
        ("120f-real", (10, 0), False),
        ("121f-real", (12, 0), False),
        ("121f-real", (12, 1), True),
        ("", (12, 0), False),
        ("90-virtual", (12, 0), True),
        ("90", (12, 0), True),
        ("121-virtual", (9, 0), False),
        ("stub", (9, 0), False),
    ],
)
def test_which_cards_a_build_runs_on(built: str, capability: tuple[int, int], runs: bool):
    assert native_library.covers(built, capability) is runs


def test_needs_only_torch_s_stable_functions_of_2_11(library: Path):
    """What libtorch 2.11 doesn't have, the header of a newer one declares behind its version."""
    header = (Path(torch.__file__).parent / "include/torch/csrc/stable/c/shim.h").read_text()
    newer = set(re.findall(r"\b(torch_\w+)\(", header.split("TORCH_VERSION_2_12_0", 1)[-1]))
    assert "torch_library_def_with_tags" in newer
    needed = run("nm", "-D", "--undefined-only", library).stdout
    symbols = [line.split()[-1] for line in needed.splitlines()]
    from_torch = {name for name in symbols if "torch" in name}
    assert {"torch_library_impl", "aoti_torch_get_current_cuda_stream"} <= from_torch
    assert all(re.match(r"(aoti_)?torch_", name) for name in from_torch), from_torch
    assert from_torch & newer == set()
    assert not [name for name in symbols if re.match(r"_?Py|_ZNK?3c10|_ZNK?2at|cuda|cu[A-Z]", name)]
    # Weak: a CPU build of torch has no streams to give.
    assert re.search(r"\bw aoti_torch_get_current_cuda_stream\b", needed)


def test_needs_no_cuda_runtime_and_no_python(library: Path):
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", library).stdout)
    assert {"libtorch.so", "libtorch_cpu.so"} <= set(needed)
    assert not [name for name in needed if re.match("libcuda|libpython|libtorch_python|libc10", name)]


def test_loads_on_the_oldest_glibc_that_torch_runs_on(library: Path):
    """2.28 by the symbols that it asks for; of the C++ library it asks for none, since it brings its own."""
    asked = run("objdump", "-T", library).stdout
    versions = [tuple(map(int, version.split("."))) for version in re.findall(r"GLIBC_([\d.]+)", asked)]
    assert versions and max(versions) <= (2, 28)
    assert "GLIBCXX" not in asked and "libstdc++" not in run("readelf", "-d", library).stdout


def test_ops_are_registered_and_fakes_work_on_this_torch(library: Path):
    result = in_a_new_process(
        library,
        """
print(library.load())
backend = Native(shape)
prepared = backend.prepare(MoEWeights.empty(shape, "cpu"))
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode(allow_non_fake_inputs=True) as mode:
    out = backend.forward_logits(prepared, mode.from_tensor(x), mode.from_tensor(logits))
print(tuple(out.shape), out.dtype)
print(library.limits().experts, library.limits().size)
print([torch.ops.mxfp4_sm120.workspace_bytes(m, 64, 32, 4, 2) for m in (1, 8, 64)])
""",
    )
    assert result.returncode == 0, result.stderr
    built, fake, limits, sizes = result.stdout.splitlines()
    assert built == "80-real 90-real 120-real 121-real"
    assert fake == "(3, 64) torch.bfloat16"
    assert limits == "256 7168"
    sizes = eval(sizes)
    assert sizes == sorted(sizes) and sizes[0] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing is missing")
@pytest.mark.parametrize("call", ["forward_logits(prepared, x, logits)", "forward(prepared, x, ids, ids.float())"])
def test_a_call_without_cuda_says_so(library: Path, call: str):
    result = in_a_new_process(
        library,
        f"""
backend, ids = Native(shape), torch.zeros(3, 2, dtype=torch.int64)
prepared = backend.prepare(MoEWeights.empty(shape, "cpu"))
backend.{call}
""",
    )
    assert "x is on the CPU, expected a CUDA tensor: the native kernels need CUDA" in result.stderr.splitlines()[-1]


def test_why_not(library: Path):
    result = in_a_new_process(
        library,
        """
import dataclasses
gpu, why_not = Machine((9, 0), (13, 0), "H100"), Native.why_not
print(why_not(Machine(None, None), shape))
print(why_not(gpu, shape))
print(why_not(Machine((10, 0), (13, 0), "B200"), shape))
for wrong in ({"hidden_size": 48}, {"intermediate_size": 7200}, {"num_experts": 257}, {"num_experts": 16, "top_k": 9}):
    print(why_not(gpu, dataclasses.replace(shape, **wrong)))
library.LIBRARY = library.LIBRARY.with_name("gone.so")
print(why_not(gpu, shape))
""",
    )
    assert result.stdout.splitlines() == [
        "it needs an NVIDIA GPU",
        "None",
        "_native.so is built for 80-real 90-real 120-real 121-real, not for sm_100: run mxfp4-sm120 build",
        "hidden size 48 isn't a multiple of 32 up to 7168",
        "intermediate size 7200 isn't a multiple of 32 up to 7168",
        "257 experts are more than 256",
        "9 experts per token are more than 8",
        "the CUDA library isn't built: run mxfp4-sm120 build",
    ], result.stderr


def test_every_tuned_rule_names_kernels_that_exist(library: Path):
    result = in_a_new_process(
        library,
        """
library.load()
from vllm_mxfp4_sm120 import config_path
from vllm_mxfp4_sm120.backends.tuning import read
for path in sorted(config_path("tuning").glob("*.json")):
    tuning.check(read(path), path.name)
    tuning.set_rule(0, read(path))
assert tuning.found("a card never seen").path == config_path("tuning", "default.json")
print("read")
tuning.check((tuning.Bound("tokens25"),), "a rule")
""",
    )
    assert result.stdout == "read\n", result.stderr
    assert "ValueError: a rule: 'tokens25' is no kernel of _native.so: decode, gathered, tokens24" in result.stderr


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ([{"kernel": "decode", "token": 8}], "is no rule: .*token"),
        ([{"tokens": 8}], "is no rule: .*kernel"),
        ([], "the last line of its rule has a bound"),
        ([{"kernel": "decode", "tokens": 8}], "the last line of its rule has a bound, expected a kernel for all other"),
    ],
)
def test_a_rule_that_is_none(tmp_path: Path, rule: list, message: str):
    path = tmp_path / "card.json"
    path.write_text(json.dumps({"rule": rule}))
    with pytest.raises(ValueError, match=message):
        tuning.read(path)
