"""Proof before use: a backend solves a small problem on this device, against the reference, before it may serve.

Kernels of a backend's own can hang, or poison the CUDA context so that nothing in the process works any more: they are
tried in a child process with a time limit, and the answer is remembered per machine and versions. Plain torch
is tried in place.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import traceback
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from vllm_mxfp4_sm120 import __version__, envs
from vllm_mxfp4_sm120.backends.base import Backend
from vllm_mxfp4_sm120.moe import Activation, MoEShape, MoEWeights, reference, topk_softmax
from vllm_mxfp4_sm120.platform import Machine, driver

# One token and more (decoding: all tokens as columns, then gathered), then 12 to 140 tokens an expert on average for
# GPT-OSS's 4 of 20, so that each of the native kernels that configs/tuning chooses from has its turn.
TOKENS = (1, 7, 20, 60, 150, 170, 230, 300, 450, 700)
EXPERTS = 20
# Outside every power-of-two tile, 3 and 5 scale columns where kernels want multiples of 4, and milliseconds on a CPU.
CPU_HIDDEN, CPU_INTERMEDIATE = 96, 160


@dataclass(frozen=True)
class Proof:
    """The outcome: `reason` is None if the answers were right. `final` is False for what may go away by itself."""

    reason: str | None
    final: bool = True


def why_not(backend: type[Backend], machine: Machine, shape: MoEShape) -> str | None:
    """One line saying how the backend failed on a small problem like `shape`, on this device; None if it's right."""
    if not backend.compiled:
        return solve(backend, problem_shape(machine, shape), device(machine)).reason
    record = record_path(backend, machine, shape)
    with _lock(record):
        if (known := recall(record)) is not None:
            return known.reason and f"{known.reason} (remembered; `mxfp4-sm120 doctor --forget` tries again)"
        proof = solve_in_child(backend, problem_shape(machine, shape), device(machine), envs.PROOF_SECONDS.get())
        if proof.final:
            remember(record, proof)
    return proof.reason


def problem_shape(machine: Machine, shape: MoEShape) -> MoEShape:
    """The small problem: few experts. GPUs get the layer's own sizes, for kernels choose their tiles by them."""
    experts = max(EXPERTS, shape.top_k)
    small = replace(shape, num_experts=experts, local_experts=experts)
    if shape.local_experts < shape.num_experts:
        small = replace(small, num_experts=2 * experts)
    if machine.capability is None:
        small = replace(small, hidden_size=CPU_HIDDEN, intermediate_size=CPU_INTERMEDIATE)
    return small


def device(machine: Machine) -> torch.device:
    """The device that this process will serve from."""
    if machine.capability is None:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_initialized() else envs.BASE_GPU_ID.get())


def random_weights(shape: MoEShape, device: torch.device | str, seed: int = 0) -> MoEWeights:
    """Weights with every code, and scales that keep activations near 1."""
    # Drawn on the CPU, the same for every device, even where vLLM has set another default device.
    draw: dict[str, Any] = {"generator": torch.Generator("cpu").manual_seed(seed), "device": "cpu"}
    weights = MoEWeights.empty(shape, device)
    for codes in (weights.w13, weights.w2):
        codes.copy_(torch.randint(0, 256, codes.shape, dtype=torch.uint8, **draw))
    for scales, k in ((weights.w13_scale, shape.hidden_size), (weights.w2_scale, shape.intermediate_size)):
        # Codes have a standard deviation near 3: 2^middle * 3 * sqrt(K) is 1 to 2.
        middle = 127 - round(math.log2(3 * math.sqrt(k)))
        scales.copy_(torch.randint(middle - 1, middle + 2, scales.shape, dtype=torch.uint8, **draw))
    for bias in (weights.w13_bias, weights.w2_bias):
        if bias is not None:
            bias.copy_(torch.randn(bias.shape, dtype=torch.float32, **draw) * 0.5)
    return weights


def random_inputs(shape: MoEShape, tokens: int, device: torch.device | str, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Activations bf16 [tokens, H] and logits bf16 [tokens, E] that send all tokens to expert 1, none to expert 0."""
    draw: dict[str, Any] = {"generator": torch.Generator("cpu").manual_seed(seed), "device": "cpu"}
    x = torch.randn(tokens, shape.hidden_size, dtype=torch.float32, **draw)
    logits = torch.randn(tokens, shape.num_experts, dtype=torch.float32, **draw) * 0.5
    if shape.num_experts > shape.top_k:
        logits[:, 0], logits[:, 1] = -9.0, 2.5
    # Rounded to BF16 like a model's router's, so that kernels which read logits in BF16 choose the same experts.
    return x.bfloat16().to(device), logits.bfloat16().to(device)


def random_router(shape: MoEShape, device: torch.device | str, seed: int = 2) -> tuple[Tensor, Tensor]:
    """A router's weights bf16 [E, H] and bias bf16 [E]."""
    draw: dict[str, Any] = {"generator": torch.Generator("cpu").manual_seed(seed), "device": "cpu"}
    weight = torch.randn(shape.num_experts, shape.hidden_size, dtype=torch.float32, **draw) * shape.hidden_size**-0.5
    return weight.bfloat16().to(device), torch.randn(shape.num_experts, **draw).bfloat16().to(device)


def solve(backend: type[Backend], shape: MoEShape, device: torch.device | str) -> Proof:
    """Run the problem in this process and judge the answers."""
    try:
        expert_map = None
        if shape.local_experts < shape.num_experts:  # every other expert lives here
            expert_map = torch.full((shape.num_experts,), -1, dtype=torch.int32, device=device)
            expert_map[1::2] = torch.arange(shape.local_experts, dtype=torch.int32, device=device)
        layer = backend(shape)
        loaded = random_weights(shape, device)
        weights = loaded.clone()
        prepared = layer.prepare(loaded)
        router, bias = random_router(shape, device)
        for tokens in TOKENS if torch.device(device).type == "cuda" else TOKENS[:2]:
            x, logits = random_inputs(shape, tokens, device)
            topk_ids, topk_weights = topk_softmax(logits, shape.top_k)
            expected = reference(weights, x, topk_ids, topk_weights, shape.activation, expert_map)
            answers = {
                "routed": (layer.forward(prepared, x, topk_ids.int(), topk_weights, expert_map), expected),
                "from logits": (layer.forward_logits(prepared, x, logits, expert_map), expected),
            }
            if backend.has_router:
                right = x.double() @ router.double().T + bias.double()
                answers["the router"] = layer.router_logits(x, router, bias), right
            for path, (answer, right) in answers.items():
                if answer.shape != right.shape or answer.dtype != x.dtype:
                    return Proof(
                        f"answered {answer.dtype} {list(answer.shape)}, expected {x.dtype} {list(right.shape)}"
                    )
                error = ((answer.double() - right).norm() / right.norm()).item()
                if not error <= backend.tolerance:  # NaN fails too
                    at = f"{error:.2g} at {tokens} tokens, {path}"
                    return Proof(f"wrong numbers: relative error {at}, expected at most {backend.tolerance}")
    except Exception as error:  # whatever a backend raises is the reason not to use it
        first_line = next(iter(str(error).strip().splitlines()), "")
        reason = f"{type(error).__name__}: {first_line}"[:300]
        return Proof(reason, final=not isinstance(error, torch.OutOfMemoryError))
    return Proof(None)


def solve_in_child(backend: type[Backend], shape: MoEShape, device: torch.device | str, seconds: float) -> Proof:
    """Run the problem in a process of its own, which may crash or hang without harm here."""
    task = {"backend": f"{backend.__module__}:{backend.__qualname__}", "shape": asdict(shape), "device": str(device)}
    child = subprocess.Popen(
        [sys.executable, "-m", __name__, json.dumps(task)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        text=True,
        start_new_session=True,  # so that a compiler it started ends with it
    )
    try:
        out, err = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # stuck in the driver, not even SIGKILL ends it: leave it behind
            child.communicate(timeout=5)
        return Proof(f"no answer within {seconds:g} s ({envs.PROOF_SECONDS.name})")
    try:
        return Proof(**json.loads(out.strip().splitlines()[-1]))
    except (IndexError, TypeError, ValueError):
        last = (err.strip().splitlines() or ["it said nothing"])[-1][:200]
        status = child.returncode
        died = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return Proof(f"its process died ({died}): {last}")


def main(task: str) -> None:
    """The child: one JSON task in, one JSON line out."""
    given = json.loads(task)
    module, name = given["backend"].split(":")
    shape = given["shape"] | {"activation": Activation(given["shape"]["activation"])}
    backend = import_module(module)
    for part in name.split("."):
        backend = getattr(backend, part)
    print("\n" + json.dumps(asdict(solve(backend, MoEShape(**shape), given["device"]))), flush=True)  # type: ignore[arg-type]


def cache_dir() -> Path:
    """Where proofs are remembered."""
    if (given := envs.CACHE_DIR.get()) is not None:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm_mxfp4_sm120"


def record_path(backend: type[Backend], machine: Machine, shape: MoEShape) -> Path:
    """The file that remembers this proof: a name made of all that could change its outcome."""
    facts = (
        backend.__module__,
        backend.__qualname__,
        __version__,
        _source_digest(backend),
        driver(),
        asdict(machine),
        asdict(problem_shape(machine, shape)),
        {name: version(name) for name in ("torch", "triton", "flashinfer-python", "flashinfer-cubin")},
    )
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return cache_dir() / "proofs" / f"{backend.name}-{digest[:24]}.json"


def recall(record: Path) -> Proof | None:
    """What is remembered, None if nothing is or it can't be read."""
    try:
        return Proof(json.loads(record.read_text())["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(record: Path, proof: Proof) -> None:
    """Write the record, whole or not at all. Where that can't be, the next start proves again, no more."""
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        draft = record.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(asdict(proof)))
        draft.replace(record)
    except OSError:
        pass


def forget() -> int:
    """Forget every proof; how many there were."""
    records = list((cache_dir() / "proofs").glob("*.json"))
    for record in records:
        record.unlink(missing_ok=True)
    return len(records)


def version(distribution: str) -> str | None:
    """A distribution's version without importing it, None if it isn't installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _lock(record: Path):
    """One process of a machine proves, the others wait and read."""
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(record.with_suffix(".lock"))
    except OSError:
        return nullcontext()


def _source_digest(backend: type[Backend]) -> str:
    """Of everything in this package that the outcome depends on, compiled libraries included."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted((*root.glob("*.py"), *root.glob("backends/*.py"), *root.rglob("*.so"))):
        digest.update(path.read_bytes())
    module = getattr(sys.modules[backend.__module__], "__file__", None)
    if module is not None:
        digest.update(Path(module).read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except Exception:
        traceback.print_exc(limit=4)
        sys.exit(1)
