# SPDX-License-Identifier: Apache-2.0
"""The CUDA library without a GPU: what it is compiled for, what is in its machine code, and how it loads.

It is compiled once, by kernels/build.sh, for the oldest card, for the one it is measured on, and for the two it is for.
"""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from vllm_mxfp4_sm120.backends.native import library as native_library
from vllm_mxfp4_sm120.backends.native import tuning

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"
ARCHITECTURES = {"sm_80", "sm_90", "sm_120", "sm_121"}

# What one block may have on sm_86, sm_89 and SM 12.x (CUDA C++ Programming Guide, technical specifications): an SM
# has 100 KB and the system keeps 1 per block. A100, H100 and B200 allow more; what stays within this runs on all.
MAX_SHARED_BYTES = 99 * 1024

# SASS for what every card from sm_80 can do: anything else fails, wgmma (HGMMA, WARPGROUP), tcgen05 (UTCHMMA, LDTM),
# tensor TMA (UTMALDG), setmaxnreg (USETMAXREG), SM120a's block-scaled mma (OMMA, QMMA) and clusters (UCGABAR, MAPA)
# among it. If a new compiler spells something harmless in a new way, see that SM 12.x has it and add it.
PORTABLE = {
    "integers, newer cards' uniform datapath included": """
        IMAD IADD IADD3 ISETP LOP3 PLOP3 SHF LEA SEL MOV PRMT POPC IABS IMNMX VIADD VIMNMX VIMNMX3 VIADDMNMX FLO BREV
        SGXT BMSK LEPC R2P P2R I2F I2FP F2I FRND CS2R S2R S2UR R2UR UMOV UIADD3 UIMAD UISETP ULEA ULOP3 UPLOP3 UPOPC
        UPRMT
        USEL USHF USGXT UFLO UBMSK UBREV UP2UR UR2UP UVIADD UVIMNMX UI2F UI2FP UF2I UFADD UFMUL UFFMA UFSETP UFSEL""",
    "floats": """
        FADD FMUL FFMA FSETP FSEL FMNMX FMNMX3 FCHK FADD2 FMUL2 FFMA2 MUFU F2F F2FP HADD2 HMUL2 HFMA2 HSETP2 HSET2
        HMNMX2""",
    "memory; LDGSTS is cp.async": """
        LDG STG LDS STS LD ST LDC LDCU ULDC LDSM ATOM ATOMG ATOMS RED REDG LDGSTS LDGDEPBAR DEPBAR CCTL MEMBAR ERRBAR
        CGAERRBAR FENCE""",
    "control and warps; B2R is what a barrier that also votes answers": """
        BRA BRX BRXU JMP CALL RET EXIT BSSY BSYNC BREAK WARPSYNC NANOSLEEP NOP YIELD BAR B2R VOTE VOTEU SHFL MATCH REDUX
        CREDUX
        ELECT ENDCOLLECTIVE KILL BPT BMOV""",
    "mma.sync": "HMMA",
    "mbarriers, and from sm_90 on, SM 12.x included, bulk copies and dependent launches": """
        SYNCS ARRIVES UBLKCP UBLKPF PREEXIT ACQBULK""",
}
ALLOWED = frozenset(" ".join(PORTABLE.values()).split())


def foreign(sass: str) -> set[str]:
    """The instructions of a SASS listing that are not on every card, with their modifiers."""
    found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)", sass, re.MULTILINE)
    # A bulk copy to several blocks of a cluster needs what SM 12.x lacks.
    return {name + modifiers for name, modifiers in found if name not in ALLOWED or "MULTICAST" in modifiers}


def run(*command: object, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**os.environ, **environment}
    )
    if check and result.returncode:
        pytest.fail(f"{' '.join(map(str, command))} failed:\n{result.stdout[-4000:]}{result.stderr[-4000:]}")
    return result


def build(*options: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return run("bash", KERNELS / "build.sh", *options, PYTHON=sys.executable, **environment)


def cuobjdump() -> object:
    """From the CUDA toolkit, or the package of that name (the one in Triton 3.6 doesn't know sm_121)."""
    on_path = shutil.which("cuobjdump")
    if on_path is not None:
        return on_path
    package = "nvidia-cuda-cuobjdump"
    program = next(file for file in metadata.files(package) or () if file.name == "cuobjdump")
    return metadata.distribution(package).locate_file(program)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if runpy.run_path(str(KERNELS / "setup.py"))["nvcc"]() is None:
        pytest.skip("nvcc isn't here to compile with")
    path = tmp_path_factory.mktemp("native") / "_native.so"
    build("--native", "-o", path, TORCH_CUDA_ARCH_LIST="8.0 9.0 12.0 12.1")
    return path


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stub") / "_native.so"
    build("--stub", "-o", path)
    return path


def in_a_new_process(library: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with the backend's library at `library`: a process can load only one."""
    start = f"""
import pathlib, torch
from vllm_mxfp4_sm120.backends.native import Native, library, tuning
from vllm_mxfp4_sm120.moe import MoEShape, MoEWeights
from vllm_mxfp4_sm120.platform import Machine
library.LIBRARY = pathlib.Path({str(library)!r})
shape = MoEShape(4, 4, 64, 32, 2)
x, logits = torch.ones(3, 64, dtype=torch.bfloat16), torch.zeros(3, 4)
"""
    return run(sys.executable, "-c", start + code, check=False, **environment)


# ---- what it is built for -------------------------------------------------------------------------------------------


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
        ("120f-real", (12, 1), True),
        ("90-virtual", (12, 0), True),
        ("90", (12, 0), True),
        ("121-virtual", (9, 0), False),
        ("stub", (9, 0), False),
    ],
)
def test_which_cards_a_build_runs_on(built: str, capability: tuple[int, int], runs: bool):
    assert native_library.covers(built, capability) is runs


# ---- what is in it --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def resources(library: Path) -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, kernel) -> what the compiler gave it: REG, STACK, SHARED, LOCAL."""
    found = {}
    arch = kernel = ""
    for line in run(cuobjdump(), "--dump-resource-usage", library).stdout.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            kernel = match[1]
        elif "REG:" in line:
            found[arch, kernel] = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
    return found


@pytest.fixture(scope="session")
def sass(library: Path) -> dict[str, str]:
    """Architecture -> its machine code, as text."""
    texts: dict[str, str] = {}
    for part in run(cuobjdump(), "--dump-sass", library).stdout.split("\narch = ")[1:]:
        arch = part.split(maxsplit=1)[0]
        texts[arch] = texts.get(arch, "") + part
    return texts


def test_every_kernel_is_compiled_for_every_architecture(resources):
    kernels = {arch: {kernel for a, kernel in resources if a == arch} for arch in ARCHITECTURES}
    assert {arch for arch, _ in resources} == ARCHITECTURES
    assert kernels["sm_80"] and all(names == kernels["sm_80"] for names in kernels.values())


def test_no_kernel_spills_or_has_a_stack_frame(resources, sass):
    """Both go through local memory, that is, through the cache and past it: weights that stream past are slowed."""
    framed = {key: use for key, use in resources.items() if use["STACK"] or use["LOCAL"]}
    assert framed == {}
    for arch, text in sass.items():
        assert re.findall(r"\b(?:LDL|STL)(?:\.\w+)*\b.*", text) == [], arch


def test_no_block_has_more_shared_memory_than_sm120_gives(library: Path, resources):
    """The GEMMs' shared memory is dynamic: the library lists it. Beside it they may have static memory."""
    # As sm_80 counts it: from sm_90 on, the system's 1 KB is included.
    static = {kernel: use["SHARED"] for (arch, kernel), use in resources.items() if arch == "sm_80"}
    gemms = [size for kernel, size in static.items() if re.search("decode_layer|grouped_gemm", kernel)]
    said = in_a_new_process(library, "library.load(); print([vars(c) for c in library.configurations()])")
    assert said.returncode == 0, said.stderr
    configurations = ast.literal_eval(said.stdout)
    assert len({config["name"] for config in configurations}) == len(configurations) == 9
    for config in configurations:
        dynamic = config["shared_bytes"]
        assert dynamic + max(gemms) <= MAX_SHARED_BYTES, f"{config}: {dynamic} dynamic, {max(gemms)} static bytes"
        assert 32 <= config["threads"] <= 1024 and config["threads"] % 32 == 0
    assert max(static.values()) <= MAX_SHARED_BYTES


def test_only_instructions_that_every_card_has(sass):
    assert set(sass) == ARCHITECTURES
    for arch, text in sass.items():
        assert "HMMA.16816.F32.BF16" in text, f"{arch}: no tensor core instruction: is this the kernels' code?"
        assert foreign(text) == set(), arch


def test_a_foreign_instruction_is_noticed():
    line = "        /*0a{}0*/              {}{} R4, R8 ;   /* 0x000 */\n"
    portable = ("HMMA.16816.F32.BF16", "UBLKCP.S.G", "LDGSTS.E.BYPASS.128", "SYNCS.ARRIVE.TRANS64")
    alien = (
        "HGMMA.64x8x16.F32.BF16",
        "UTCHMMA",
        "UTMALDG.2D",
        "UBLKCP.MULTICAST",
        "USETMAXREG.DEALLOC.CTAPOOL",
        "OMMA.SF",
    )
    listing = "".join(line.format(i, "@!P0 " if i % 2 else "", name) for i, name in enumerate(portable + alien))
    assert foreign(listing) == set(alien)


# ---- how it loads ---------------------------------------------------------------------------------------------------


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
for path in sorted(config_path("tuning").glob("*.json")):
    tuning._set_rule(0, tuning.read(path), path.name)
assert tuning.rule_path("a card never seen") == config_path("tuning", "default.json")
print("read")
tuning._set_rule(0, (tuning.Bound("tokens25"),), "a rule")
""",
    )
    assert result.stdout == "read\n", result.stderr
    assert "ValueError: a rule: tokens25 is no kernel of _native.so: decode, gathered, tokens24" in result.stderr


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


# ---- the stub, and where nothing can be built ------------------------------------------------------------------------


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


def test_around_the_kernels(stub: Path):
    """What the ops do but compute, which the stub does too: the rule, refusals that name what is wrong, compiling."""
    result = in_a_new_process(
        stub,
        """
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
def refusal(**changes):
    try:
        op(**{**arguments, **changes})
    except RuntimeError as error:
        return str(error)
print(refusal(config=1), refusal(config=1, **many))
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
""",
        MXFP4_SM120_ALLOW_STUB_KERNEL="1",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "None mxfp4_sm120: config zeros8 takes up to 8 tokens, not 12",
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
