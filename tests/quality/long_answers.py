# SPDX-License-Identifier: Apache-2.0
"""Long greedy answers of the engine, followed token by token by transformers' models of the same checkpoint.

    PYTHONPATH=.:benchmarks python -m tests.quality.long_answers [--tokens 2048]

Each position is judged after the engine's own tokens, so that the first difference is that of two greedy answers, and
all others are seen too. In BF16 another sum's order can choose another fourth expert of two that are as good, and what
comes out isn't close then. So there is a third judge: transformers with the experts that the engine chose.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from quality import SMALL
from quality_logits import Setting, load_transformers, start_engine
from torch import Tensor

PROMPTS = (
    "It is a truth universally acknowledged, that",
    "Elizabeth was not in the least surprised",
    "The captain looked at the whale",
    "In the beginning",
    "Her father was a man of",
    "After dinner the ladies",
)


SAME_EXPERTS = "float32, the engine's experts"
# How far apart rounding leaves two log-probabilities whose order it decides: 0.078 was seen in 12,288 tokens.
LEAD_BOUND = 0.1


@dataclass(frozen=True)
class Answer:
    """Token ids, and the experts chosen for each of them but the last: int64 [layers, tokens, k]."""

    prompt: list[int]
    tokens: list[int]
    experts: Tensor


@dataclass(frozen=True)
class Difference:
    """A position of the answer, and by how much in log-probability the token there is behind the judge's best."""

    position: int
    behind: float


def answer(llm: Any, prompt: str, tokens: int) -> Answer:
    """The engine's greedy answer. The engine must run in this process."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    llm.apply_model(start_watching_experts)
    (request,) = llm.generate([prompt], sampling, use_tqdm=False)
    (experts,) = llm.apply_model(stop_watching_experts)
    ids = list(request.prompt_token_ids), list(request.outputs[0].token_ids)
    return Answer(*ids, experts[:, : len(ids[0]) + tokens - 1])


def start_watching_experts(model: Any) -> None:
    for method in _methods(model):
        seen: list[Tensor] = []
        forward = method.backend.forward

        def watched(
            prepared: Any, x: Any, topk_ids: Tensor, *rest: Any, seen: Any = seen, forward: Any = forward
        ) -> Any:
            seen.append(topk_ids.clone())
            return forward(prepared, x, topk_ids, *rest)

        method.backend.forward, method.backend.seen = watched, seen


def stop_watching_experts(model: Any) -> Tensor:
    chosen = [torch.cat(vars(method.backend).pop("seen")) for method in _methods(model)]
    for method in _methods(model):
        del method.backend.forward
    return torch.stack(chosen)


def _methods(model: Any) -> Iterator[Any]:
    return (layer.mlp.experts.routed_experts.quant_method for layer in model.model.layers)


@contextmanager
def choosing(model: Any, experts: Tensor) -> Iterator[None]:
    """Transformers' routers choose these experts, with weights of their own: int64 [layers, tokens, k]."""

    def route(router: Any, arguments: Any, output: Any, chosen: Tensor) -> Any:
        logits = output[0]
        return logits, logits.gather(1, chosen).softmax(1), chosen

    hooks = [
        layer.mlp.router.register_forward_hook(lambda *call, chosen=chosen: route(*call, chosen))
        for layer, chosen in zip(model.model.layers, experts, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def logits_of(model: Any, given: Answer) -> Tensor:
    """float32 [answer's tokens, vocabulary], what the judge makes of each position."""
    ids = torch.tensor([[*given.prompt, *given.tokens[:-1]]])
    return model(ids, use_cache=False).logits[0, len(given.prompt) - 1 :].float()


def differences(logits: Tensor, tokens: Sequence[int] | Tensor) -> list[Difference]:
    chosen = torch.as_tensor(tokens)
    behind = logits.amax(-1) - logits.gather(1, chosen[:, None])[:, 0]
    return [Difference(int(i), float(behind[i])) for i in (logits.argmax(-1) != chosen).nonzero()[:, 0]]


def judge(
    llm: Any, models: dict[str, Any], prompts: Iterable[str], tokens: int
) -> dict[str, dict[str, list[Difference]]]:
    """For each prompt: the engine against transformers in each dtype, with the experts that each chooses, and with the

    engine's; and transformers in BF16 against float32, at the same places.
    """
    found = {}
    for prompt in prompts:
        given = answer(llm, prompt, tokens)
        logits = {name: logits_of(model, given) for name, model in models.items()}
        with choosing(models["float32"], given.experts):
            logits[SAME_EXPERTS] = logits_of(models["float32"], given)
        found[prompt] = {name: differences(each, given.tokens) for name, each in logits.items()}
        found[prompt]["bfloat16 against float32"] = differences(logits["float32"], logits["bfloat16"].argmax(-1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    given = parser.parse_args()
    checkpoint = str(SMALL / "checkpoint")
    llm = start_engine(checkpoint, given.tokens + 64, Setting.parse(["skip_tokenizer_init=false"]).arguments)
    models = {dtype: load_transformers(checkpoint, dtype) for dtype in ("bfloat16", "float32")}
    print("| prompt | judge | tokens that differ | first at | its lead | largest lead |\n|---|---|---|---|---|---|")
    for prompt, judges in judge(llm, models, PROMPTS, given.tokens).items():
        for name, found in judges.items():
            first = f"{found[0].position} | {found[0].behind:.3f}" if found else "- | -"
            largest = max((d.behind for d in found), default=0.0)
            print(f"| {prompt} | {name} | {len(found)} | {first} | {largest:.3f} |", flush=True)


if __name__ == "__main__":
    main()
