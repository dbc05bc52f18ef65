# SPDX-License-Identifier: Apache-2.0
"""The small problem that a backend must solve, and how its answers are judged against the float64 reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from vllm_mxfp4_sm120 import settings
from vllm_mxfp4_sm120.backends.base import Backend, Prepared
from vllm_mxfp4_sm120.moe import Activation, MoEShape, MoEWeights, reference, topk_softmax
from vllm_mxfp4_sm120.platform import Machine, current_gpu

# One token and more (decoding: all tokens as columns, then gathered), then 12 to 140 tokens an expert on average for
# GPT-OSS's 4 of 20, so that each of the native kernels that configs/tuning chooses from has its turn.
TOKENS = (1, 7, 20, 60, 150, 170, 230, 300, 450, 700)
EXPERTS = 20
# Outside every power-of-two tile, 3 and 5 scale columns where kernels want multiples of 4, and milliseconds on a CPU.
CPU_HIDDEN, CPU_INTERMEDIATE = 96, 160


# Like GPT-OSS's outputs, which reach 10,000 beside ordinary ones: one column in so many is 2^so much as large.
OUTLIER_EVERY, OUTLIER_LOG2 = 16, 20
# One token is so much larger than the others, one so much smaller.
LARGE_TOKEN, TINY_TOKEN = 16.0, 1 / 64

# What CUDA says where a library holds no code for this card, or code that the card hasn't: that stays so, unlike all
# else that raises.
MISSING_KERNEL = ("no kernel image", "NO_BINARY_FOR_GPU", "invalid device function", "illegal instruction")


@dataclass(frozen=True)
class Proof:
    """The outcome: `reason` is None if the answers were right.

    `final` is True for what will be the same next time: right numbers, wrong numbers, a missing kernel. Everything else
    (no memory, a busy GPU, no answer in time) may go away by itself. `found` is what else was found, as JSON.
    """

    reason: str | None
    final: bool = True
    found: Any = field(default=None, repr=False)

    @classmethod
    def of_error(cls, error: Exception) -> Proof:
        """Whatever a kernel raises is the reason not to use it."""
        first_line = next(iter(str(error).strip().splitlines()), "")
        final = any(words in str(error) for words in MISSING_KERNEL)
        return cls(f"{type(error).__name__}: {first_line}"[:300], final)


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
    return torch.device("cuda", current_gpu(settings.BASE_GPU_ID.get()))


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
    """Activations bf16 [tokens, H] and logits bf16 [tokens, E] that send all tokens to expert 1, none to expert 0.

    Of three tokens and more the second is large and the third tiny.
    """
    draw: dict[str, Any] = {"generator": torch.Generator("cpu").manual_seed(seed), "device": "cpu"}
    x = torch.randn(tokens, shape.hidden_size, dtype=torch.float32, **draw)
    if tokens > 2:
        x[1], x[2] = x[1] * LARGE_TOKEN, x[2] * TINY_TOKEN
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


def outlier_columns(shape: MoEShape) -> Tensor:
    """bool [H], on the CPU: a different one of each four neighbours in turn."""
    column = torch.arange(shape.hidden_size, device="cpu")
    return column % OUTLIER_EVERY == column // OUTLIER_EVERY % 4


def relative_error(answer: Tensor, right: Tensor) -> float:
    """The worst token's (Frobenius), for a large one would hide all others. NaN for a NaN anywhere."""
    return float(token_errors(answer, right).max())


def token_errors(answer: Tensor, right: Tensor) -> Tensor:
    """Each token's relative error (Frobenius), float64 [M]."""
    error, size = (answer.double() - right).norm(dim=1), right.norm(dim=1)
    errors: Tensor = error / size.clamp(min=torch.finfo(torch.float64).tiny)
    return errors


def scattered(shape: MoEShape, device: torch.device | str) -> Tensor | None:
    """An expert map int32 [num_experts] whose local experts lie among the others; None where all are local."""
    if shape.local_experts == shape.num_experts:
        return None
    expert_map = torch.full((shape.num_experts,), -1, dtype=torch.int32, device=device)
    step = shape.num_experts // max(1, shape.local_experts)
    here = torch.arange(shape.local_experts, dtype=torch.int32, device=device)
    expert_map[step - 1 :: step][: shape.local_experts] = here
    return expert_map


@dataclass(frozen=True)
class Question:
    """Tokens, where they go, and the layer's right answer float64 [M, H]."""

    x: Tensor
    logits: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    right: Tensor


class Problem:
    """Random weights and questions, for any number of backends: what is right is computed once."""

    def __init__(self, shape: MoEShape, device: torch.device | str) -> None:
        self.shape, self.device, self.expert_map = shape, torch.device(device), scattered(shape, device)
        self.weights = random_weights(shape, device)
        outlier = outlier_columns(shape).to(device)
        self.weights.w2_scale[:, outlier] += OUTLIER_LOG2
        # Makes columns alike: each counts.
        self.ordinary = torch.where(outlier, 2.0**-OUTLIER_LOG2, 1.0).double()
        self.router, self.router_bias = random_router(shape, device)
        self._questions: dict[int, Question] = {}

    def question(self, tokens: int) -> Question:
        if tokens not in self._questions:
            x, logits = random_inputs(self.shape, tokens, self.device)
            routing = topk_softmax(logits, self.shape.top_k)
            right = reference(self.weights, x, *routing, self.shape.activation, self.expert_map)
            self._questions[tokens] = Question(x, logits, *routing, right)
        return self._questions[tokens]

    def judge(self, backend: type[Backend]) -> Proof:
        """Ask a backend all questions. `found`: the largest `error` of a token, and root mean square of an answer's."""
        try:
            worst = mean = 0.0
            layer = backend(self.shape)
            prepared = layer.prepare(self.weights.clone())
            for tokens in TOKENS if self.device.type == "cuda" else TOKENS[:2]:
                for path, (answer, right, scale) in self._answers(layer, prepared, self.question(tokens)).items():
                    if answer.shape != right.shape or answer.dtype != torch.bfloat16:
                        expected = f"{torch.bfloat16} {list(right.shape)}"
                        return Proof(f"answered {answer.dtype} {list(answer.shape)}, expected {expected}")
                    errors = token_errors(answer * scale, right * scale)
                    error = float(errors.max())
                    if not error <= backend.tolerance:  # NaN fails too
                        at = f"{error:.2g} at {tokens} tokens, {path}"
                        return Proof(f"wrong numbers: relative error {at}, expected at most {backend.tolerance}")
                    worst, mean = max(worst, error), max(mean, float(errors.square().mean().sqrt()))
        except Exception as error:
            return Proof.of_error(error)
        return Proof(None, found={"error": worst, "mean": mean})

    def _answers(self, layer: Backend, prepared: Prepared, asked: Question) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """By way in: what a backend answers, what is right, and what makes columns alike."""
        routed = layer.forward(prepared, asked.x, asked.topk_ids.int(), asked.topk_weights, self.expert_map)
        from_logits = layer.forward_logits(prepared, asked.x, asked.logits, self.expert_map)
        answers = {
            "routed": (routed, asked.right, self.ordinary),
            "from logits": (from_logits, asked.right, self.ordinary),
        }
        if layer.has_router:
            right = asked.x.double() @ self.router.double().T + self.router_bias.double()
            answer = layer.router_logits(asked.x, self.router, self.router_bias)
            answers["the router"] = answer, right, torch.ones_like(right[0])
        return answers


def solve(backend: type[Backend], shape: MoEShape, device: torch.device | str) -> Proof:
    """Run the problem in this process and judge the answers."""
    try:
        problem = Problem(shape, device)
    except Exception as error:
        return Proof.of_error(error)
    return problem.judge(backend)


def solve_named(backend: str, shape: dict[str, Any], device: str) -> Proof:
    """`solve` for what a JSON text can hold: "module:Class" and a shape's fields."""
    module, _, qualname = backend.partition(":")
    found: Any = import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return solve(found, shape_of(shape), device)


def shape_of(fields: dict[str, Any]) -> MoEShape:
    """From JSON."""
    return MoEShape(**fields | {"activation": Activation(fields["activation"])})
