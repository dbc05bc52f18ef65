# SPDX-License-Identifier: Apache-2.0
"""Train this model: transformers' GPT-OSS, its experts seen through MXFP4 all the way, some minutes on one GPU.

    python models/gpt-oss-small/corpus.py packages .run/corpus       # once; says where the text comes from
    PYTHONPATH=. python models/gpt-oss-small/train.py .run/corpus OUTPUT [--minutes 6]

OUTPUT/checkpoint is the packed model with the lowest held-out loss so far, OUTPUT/training.json the loss curve; both
are written again at every evaluation, so a run that is cut short leaves a model too.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from vllm_mxfp4_sm120 import mxfp4
from vllm_mxfp4_sm120.checkpoint import Writer
from vllm_mxfp4_sm120.moe import MoEWeights

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """What a run depends on, beside the text and the number of seconds it may take."""

    seed: int = 0
    steps: int = 2600  # about 30 times through the text
    sequences: int = 32  # a step
    length: int = 1024  # tokens a sequence: the context that YaRN starts from
    learning_rate: float = 2e-3
    warmup: int = 100
    last_rate: float = 0.02  # of the learning rate, where the cosine ends
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1  # of matrices, but not of experts: a clamp that nothing reaches could not be tested
    dropout: float = 0.1
    clip: float = 1.0
    balance: float = 0.01  # weight of the loss that spreads tokens over experts
    gate_up_gain: float = 2.0  # of what leaves a fresh gate_up_proj, in units of what enters: some of it is clamped
    evaluate_every: int = 200


def through_mxfp4(weight: Tensor) -> Tensor:
    """[E, K, N] -> the values that MXFP4 makes of it, 32 neighbours along K to a scale; gradients pass straight."""
    packed = mxfp4.dequantize(*mxfp4.quantize(weight.detach().transpose(1, 2)), weight.dtype).transpose(1, 2)
    return weight + (packed - weight).detach()


def all_experts(experts: nn.Module, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """What transformers' loop over experts computes, as two matrix products, with weights as MXFP4 keeps them.

    All experts are one wide layer, whose activations are weighted by the router: with 0 where an expert isn't chosen.
    x [T, H], topk_ids and topk_weights [T, k] -> [T, H].
    """
    gate_up, down = through_mxfp4(experts.gate_up_proj), through_mxfp4(experts.down_proj)
    count, hidden, _ = gate_up.shape
    weights = torch.zeros(len(x), count, dtype=topk_weights.dtype, device=x.device).scatter(1, topk_ids, topk_weights)
    wide = x @ gate_up.transpose(0, 1).reshape(hidden, -1)
    wide = wide + experts.gate_up_proj_bias.flatten().to(wide.dtype)
    activated = experts._apply_gate(wide.unflatten(1, (count, -1))) * weights[..., None].to(wide.dtype)
    return (activated.flatten(1) @ down.flatten(0, 1) + weights @ experts.down_proj_bias).to(x.dtype)


ALL_EXPERTS_FUNCTIONS["mxfp4_all_experts"] = all_experts


def fresh_model(recipe: Recipe, config_file: Path = HERE / "config.json") -> GptOssForCausalLM:
    """transformers' GPT-OSS in float32 with random weights, dropout behind attention and experts."""
    values = json.loads(config_file.read_text())
    del values["quantization_config"]
    config = GptOssConfig.from_dict(values)
    config._attn_implementation = "eager"
    config._experts_implementation = "mxfp4_all_experts"
    model = GptOssForCausalLM(config).float()
    config._experts_implementation = model.config._experts_implementation = "mxfp4_all_experts"

    def drop(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return F.dropout(output, recipe.dropout, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.experts.register_forward_hook(drop)
        nn.init.normal_(layer.mlp.experts.gate_up_proj, std=recipe.gate_up_gain * config.hidden_size**-0.5)
    return model


def imbalance(router_logits: Tensor, top_k: int) -> Tensor:
    """1 where all experts get as many tokens, more where they don't (Switch Transformer, equation 4)."""
    probabilities = router_logits.float().softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter(1, router_logits.topk(top_k).indices, 1 / top_k)
    return router_logits.shape[-1] * (chosen.mean(0) * probabilities.mean(0)).sum()


def loss_of(model: GptOssForCausalLM, window: Tensor, balance: float = 0.0) -> tuple[Tensor, Tensor]:
    """Cross entropy of a window's [B, length + 1] next tokens in nats, and that plus `balance` times the imbalance."""
    device_type = window.device.type
    with torch.autocast(device_type, torch.bfloat16, enabled=device_type == "cuda"):
        out = model(window[:, :-1], output_router_logits=balance > 0, use_cache=False)
        loss = F.cross_entropy(out.logits.flatten(0, 1).float(), window[:, 1:].flatten())
    if balance == 0:
        return loss, loss
    top_k = model.config.num_experts_per_tok
    return loss, loss + balance * torch.stack([imbalance(logits, top_k) for logits in out.router_logits]).mean()


def windows(tokens: Tensor, recipe: Recipe, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches [sequences, length + 1] without end: every time through, the text is cut elsewhere and shuffled."""
    size = recipe.length
    while True:
        first = int(torch.randint(size, (1,), generator=generator))
        starts = torch.arange(first, len(tokens) - size - 1, size)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for batch in starts.split(recipe.sequences):
            if len(batch) == recipe.sequences:
                yield tokens[(batch[:, None] + torch.arange(size + 1)).to(tokens.device)]


@torch.no_grad()
def held_out_loss(model: GptOssForCausalLM, tokens: Tensor, recipe: Recipe) -> float:
    """Nats a token, over the whole of `tokens` that fills sequences."""
    model.eval()
    size = recipe.length
    rows = torch.stack([tokens[at : at + size + 1] for at in range(0, len(tokens) - size - 1, size)])
    total = sum(float(loss_of(model, part)[0]) * len(part) for part in rows.split(recipe.sequences))
    model.train()
    return total / len(rows)


def optimizer_of(model: GptOssForCausalLM, recipe: Recipe) -> torch.optim.Optimizer:
    decayed = [
        p for name, p in model.named_parameters() if p.ndim == 2 and "bias" not in name and "experts" not in name
    ]
    chosen = {id(p) for p in decayed}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=fused)


def rate(recipe: Recipe, step: int, progress: float) -> float:
    """The learning rate: up in a line, then down along a cosine while `progress` goes from 0 to 1."""
    cosine = recipe.last_rate + (1 - recipe.last_rate) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return recipe.learning_rate * min(cosine, (step + 1) / recipe.warmup)


def write_checkpoint(model: GptOssForCausalLM, directory: Path, tokenizer_file: Path) -> None:
    """The packed model in the published layout, everything but its experts in BF16, in place of the last one."""
    new = directory.with_name(directory.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    with Writer(new) as writer:
        for name, tensor in model.state_dict().items():
            if ".mlp.experts." not in name:
                writer.add(name, tensor.detach().to(torch.bfloat16))
        for index, layer in enumerate(model.model.layers):
            experts = layer.mlp.experts
            w13, w13_scale = mxfp4.quantize(experts.gate_up_proj.detach().transpose(1, 2))
            w2, w2_scale = mxfp4.quantize(experts.down_proj.detach().transpose(1, 2))
            biases = [bias.detach().to(torch.bfloat16) for bias in (experts.gate_up_proj_bias, experts.down_proj_bias)]
            writer.add_experts(index, MoEWeights(w13, w13_scale, w2, w2_scale, *biases))
        config = json.loads((HERE / "config.json").read_text())
        writer.write_json("config.json", config)
        special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        writer.write_json("generation_config.json", special)
        shutil.copyfile(tokenizer_file, writer.draft / "tokenizer.json")
        names = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|return|>",
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        }
        writer.write_json("tokenizer_config.json", names)
    shutil.rmtree(directory, ignore_errors=True)
    new.rename(directory)


def train(corpus: Path, output: Path, recipe: Recipe, seconds: float, device: str) -> GptOssForCausalLM:
    begin = time.monotonic()
    torch.manual_seed(recipe.seed)
    text = {n: torch.from_numpy(np.load(corpus / f"{n}.npy").astype(np.int64)).to(device) for n in ("train", "heldout")}
    model = fresh_model(recipe).to(device).train()
    optimizer = optimizer_of(model, recipe)
    batches = windows(text["train"], recipe, torch.Generator().manual_seed(recipe.seed))
    log: dict[str, Any] = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "machine": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "evaluations": [],
    }
    best, step, progress, recent = math.inf, 0, 0.0, torch.zeros((), device=device)
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate(recipe, step, progress)
        loss, with_balance = loss_of(model, next(batches), recipe.balance)
        with_balance.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent = loss.detach() if step == 0 else recent.lerp(loss.detach(), 0.05)
        step += 1
        # Whichever comes first, the last step or the last second, finds the learning rate at its end.
        progress = max(step / recipe.steps, (time.monotonic() - begin) / seconds)
        if step % recipe.evaluate_every and progress < 1:
            continue
        held_out = held_out_loss(model, text["heldout"], recipe)
        row = {"step": step, "seconds": round(time.monotonic() - begin, 1), "train": float(recent), "heldout": held_out}
        log["evaluations"].append(row)
        print(f"{row}  {step * recipe.sequences * recipe.length / row['seconds']:.0f} tokens/s", flush=True)
        if held_out < best:
            best = held_out
            write_checkpoint(model, output / "checkpoint", corpus / "tokenizer.json")
        (output / "training.json").write_text(json.dumps(log, indent=1) + "\n")
    return model


@torch.no_grad()
def show(model: GptOssForCausalLM, tokenizer_file: Path, prompts: list[str], tokens: int) -> None:
    """Greedy completions, to see at once what came out."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file))
    model.eval()
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt)], device=next(model.parameters()).device)
        for _ in range(tokens):
            best = model(ids, use_cache=False).logits[0, -1].argmax()
            ids = torch.cat((ids, best[None, None]), dim=1)
        print(repr(tokenizer.decode(ids[0])), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="what corpus.py wrote")
    parser.add_argument("output", type=Path)
    parser.add_argument("--minutes", type=float, default=6.0, help="the training ends before then (default 6)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, value in asdict(Recipe()).items():
        if isinstance(value, int | float):
            parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    args = vars(parser.parse_args())
    recipe = Recipe(**{name: args[name] for name in asdict(Recipe()) if name in args})
    args["output"].mkdir(parents=True, exist_ok=True)
    model = train(args["corpus"], args["output"], recipe, args["minutes"] * 60, args["device"])
    prompts = ["It is a truth universally acknowledged, that", "Elizabeth was", "The whale", "In the beginning"]
    show(model, args["corpus"] / "tokenizer.json", prompts, tokens=60)


if __name__ == "__main__":
    main()
