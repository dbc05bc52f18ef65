# SPDX-License-Identifier: Apache-2.0
"""The kernels on a CPU: kernels/csrc compiled as C++ against emulator/, and the layer that it computes."""

from __future__ import annotations

import ctypes
import faulthandler
import hashlib
import mmap
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from vllm_mxfp4_sm120.backends.native.layout import tile_experts
from vllm_mxfp4_sm120.moe import Activation, MoEShape, MoEWeights

EMULATOR = Path(__file__).with_name("emulator")
ROOT = Path(__file__).parents[2]
CSRC = ROOT / "kernels" / "csrc"
BUILT = ROOT / "build" / "emulated"


def sources(csrc: Path = CSRC) -> list[Path]:
    """The kernels' files; the bindings and other people's kernels are none."""
    files = (path for pattern in ("*.h", "*.cuh", "*.cu") for path in csrc.rglob(pattern))
    return [path for path in files if path.stem not in ("cutlass_sm120", "flashinfer_sm120")]


def build(csrc: Path = CSRC, arch: int = 800, twin: bool = False) -> ctypes.CDLL:
    """The kernels compiled for the emulator, as for a card of that __CUDA_ARCH__.

    From 1200 on with the FP4 kernels and their instruction; with `twin` with ordinary products in its place.
    Once, for all processes and all runs: the file's name says what it was compiled from, and by what.
    """
    files = {path.relative_to(csrc): path for path in sources(csrc)}
    files |= {path.relative_to(EMULATOR): path for path in EMULATOR.rglob("*.*")}  # some in place of the kernels'
    compiler = ["g++", "-std=c++17", "-O2", "-fPIC", "-w", f"-D__CUDA_ARCH__={arch}"]
    compiler.append("-U_FORTIFY_SOURCE")  # by which glibc takes jumps between stacks for a fault
    if arch < 1200 and not twin:
        files = {name: path for name, path in files.items() if not name.as_posix().startswith("fp4")}
    elif not twin:
        compiler.append("-DMXFP4_SM120_BLOCK_SCALED")
    digest = hashlib.sha256(repr(compiler).encode() + subprocess.check_output(["g++", "--version"]))
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0".encode() + path.read_bytes())
    BUILT.mkdir(parents=True, exist_ok=True)
    library = BUILT / f"{digest.hexdigest()[:32]}.so"
    with FileLock(library.with_suffix(".lock")):
        if not library.exists():
            with TemporaryDirectory(dir=BUILT) as directory:
                compile_files(files, compiler, Path(directory)).rename(library)
    built = ctypes.CDLL(str(library))
    check_layout(built, MoeArgs, "MOE_ARGS")
    check_layout(built, RouterArgs, "ROUTER_ARGS")
    check_layout(built, DenseArgs, "DENSE_ARGS")
    return built


def compile_files(files: Mapping[Path, Path], compiler: Sequence[str], directory: Path) -> Path:
    """The library, in `directory`, of files by the names that they are included by. AssertionError: what g++ said."""
    for name, path in files.items():
        copy = directory / name
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    running = []
    for source in (*directory.rglob("*.cu"), *directory.glob("*.cpp")):
        command = [*compiler, f"-I{directory}", "-x", "c++", "-c", source, "-o", directory / f"{source.stem}.o"]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    library = directory / "emulated.so"
    subprocess.run(["g++", "-shared", "-o", library, *directory.glob("*.o")], check=True)
    return library


class MoeArgs(ctypes.Structure):
    """MoeArgs of moe.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "w13", "w2", "w13_bias", "w2_bias", "router_logits")),
        ("logits_fp32", ctypes.c_bool),
        *((name, ctypes.c_void_p) for name in ("topk_ids", "topk_weights", "expert_map", "out", "workspace")),
        *((name, ctypes.c_int) for name in ("M", "H", "I", "num_experts", "local_experts", "top_k")),
        ("swiglu_oai", ctypes.c_bool),
    )


class RouterArgs(ctypes.Structure):
    """RouterArgs of moe.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out")),
        *((name, ctypes.c_int) for name in ("M", "H", "experts")),
    )


class DenseArgs(ctypes.Structure):
    """DenseArgs of dense/dense.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "scale", "bias", "out", "partial")),
        *((name, ctypes.c_int) for name in ("M", "N", "K")),
    )


def check_layout(library: ctypes.CDLL, mirror: type[ctypes.Structure], name: str) -> None:
    """Does C++ see the fields where the mirror has them?"""
    fields = [getattr(mirror, field[0]).offset for field in mirror._fields_]
    there = list((ctypes.c_int * (1 + len(fields))).in_dll(library, name))
    assert there == [ctypes.sizeof(mirror), *fields], f"{mirror.__name__} isn't as in moe.h: {there}"


def configs(library: ctypes.CDLL) -> dict[str, int]:
    """The dispatch table's names in order, and the most tokens that each takes."""
    library.config_name.restype = ctypes.c_char_p
    found: dict[str, int] = {}
    while (name := library.config_name(len(found))) is not None:
        found[name.decode()] = library.config_tokens(len(found))
    return found


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def aligned(tensor: Tensor) -> Tensor:
    """A copy at a multiple of 256, as a GPU's allocator gives it."""
    room = torch.empty(tensor.nbytes + 256, dtype=torch.uint8)
    start = -room.data_ptr() % 256
    copy = room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def fenced(*tensors: Tensor | None) -> Iterator[Tensor | None]:
    """Copies that each end where memory does: a kernel that reads or writes past one crashes."""
    for tensor in tensors:
        if tensor is None:
            yield None
            continue
        size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        room = torch.frombuffer(mmap.mmap(-1, size + mmap.PAGESIZE), dtype=torch.uint8)
        fence = ctypes.c_void_p(room.data_ptr() + size)
        assert ctypes.CDLL(None).mprotect(fence, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        yield room[size - tensor.nbytes : size].view(tensor.dtype).view(tensor.shape).copy_(tensor)


class Emulated:
    """A layer's weights, and the library that computes with them."""

    def __init__(self, library: ctypes.CDLL, shape: MoEShape, weights: MoEWeights) -> None:
        self.library, self.shape = library, shape
        library.moe.restype = library.router.restype = ctypes.c_char_p
        library.moe_workspace_bytes.restype = library.moe_kept_bytes.restype = ctypes.c_int64
        self.w13 = aligned(tile_experts(weights.w13.clone(), weights.w13_scale.clone(), "w13"))
        self.w2 = aligned(tile_experts(weights.w2.clone(), weights.w2_scale.clone(), "w2"))
        self.biases = [None if bias is None else aligned(bias) for bias in (weights.w13_bias, weights.w2_bias)]

    def workspace_bytes(self, tokens: int) -> int:
        shape = self.shape
        sizes = (tokens, shape.hidden_size, shape.intermediate_size, shape.local_experts, shape.top_k)
        return self.library.moe_workspace_bytes(*sizes)

    def workspace(self, tokens: int) -> Tensor:
        """Zeros in what is kept from call to call, and rubbish."""
        workspace = aligned(torch.full((self.workspace_bytes(tokens),), 0xFF, dtype=torch.uint8))
        workspace[: self.library.moe_kept_bytes()] = 0
        return workspace

    def _launch(self) -> Callable[..., bytes | None]:
        return self.library.moe

    def __call__(
        self,
        x: Tensor,
        logits: Tensor | None,
        config: int,
        expert_map: Tensor | None = None,
        workspace: Tensor | None = None,
        topk: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """From router logits, or from topk_ids int32 [M, k] and topk_weights float32 [M, k] instead."""
        shape = self.shape
        if x.shape[0] == 0:  # the op launches nothing then
            return torch.empty_like(x)
        if workspace is None:
            workspace = self.workspace(x.shape[0])
        x, out = aligned(x), aligned(torch.full_like(x, torch.nan))
        logits = None if logits is None else aligned(logits)
        topk_ids, topk_weights = map(aligned, topk) if topk else (None, None)
        tensors = (x, self.w13, self.w2, *self.biases, logits)
        args = MoeArgs(
            *map(pointer, tensors),
            logits is not None and logits.dtype == torch.float32,
            *map(pointer, (topk_ids, topk_weights, expert_map, out, workspace)),
            *(x.shape[0], shape.hidden_size, shape.intermediate_size),
            *(shape.num_experts, shape.local_experts, shape.top_k),
            shape.activation is Activation.SWIGLU_OAI,
        )
        error = self._launch()(ctypes.byref(args), config)
        assert error is None, error
        assert self.library.early_loads() == 0, "shared memory is read while copies to it are under way"
        return out


def router(library: ctypes.CDLL, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.full((x.shape[0], weight.shape[0]), torch.nan, dtype=torch.bfloat16)
    x, weight, bias, out = fenced(x, weight, bias, out)
    library.router.restype = ctypes.c_char_p
    args = RouterArgs(*map(pointer, (x, weight, bias, out)), x.shape[0], x.shape[1], weight.shape[0])
    error = library.router(ctypes.byref(args))
    assert error is None, error
    return out


def dense_configs(library: ctypes.CDLL) -> list[str]:
    library.dense_name.restype = ctypes.c_char_p
    found: list[str] = []
    while (name := library.dense_name(len(found))) is not None:
        found.append(name.decode())
    return found


def assert_a_lost_block_traps(library: ctypes.CDLL, call: Callable[[], object], capfd: pytest.CaptureFixture) -> None:
    """In a child, for the emulator aborts at a trap."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # it would print where, as of a crash
        library.emulate(2, True, 0)
        library.lose_block(1)
        call()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGABRT
    assert "a trap ends the kernel" in capfd.readouterr().err


def dequantized(library: ctypes.CDLL, codes: Tensor, scales: Tensor) -> Tensor:
    """codes int8 [N, K], scales bf16 [K/64, N, 2] -> bf16 [N, K]."""
    codes, scales, out = fenced(codes, scales, torch.full(codes.shape, torch.nan, dtype=torch.bfloat16))
    library.dense_dequantized.restype = ctypes.c_char_p
    args = DenseArgs(None, pointer(codes), pointer(scales), None, pointer(out), None, 0, *codes.shape)
    error = library.dense_dequantized(ctypes.byref(args))
    assert error is None, error
    return out


def dense(
    library: ctypes.CDLL, config: int, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """x bf16 [M, K], weight bf16 or int8 [N, K], scale bf16 [K/64, N, 2], bias bf16 [N]."""
    out = torch.full((x.shape[0], weight.shape[0]), torch.nan, dtype=torch.bfloat16)
    x, weight, scale, bias, out = fenced(x, weight, scale, bias, out)
    library.dense.restype = ctypes.c_char_p
    args = DenseArgs(*map(pointer, (x, weight, scale, bias, out)), None, x.shape[0], *weight.shape)
    error = library.dense(ctypes.byref(args), config)
    assert error is None, error
    assert library.early_loads() == 0, "shared memory is read while copies to it are under way"
    return out
