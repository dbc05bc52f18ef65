"""`mxfp4-sm120 make-tiny DIR`: a GPT-OSS checkpoint small enough for a laptop, in the published layout.

Its sizes are those of configs/tiny/config.json. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vllm_mxfp4_sm120 import config_path, mxfp4

# What the tokenizer learns its merges from. Any English would do.
TEXT = """
A mixture of experts holds many small networks and asks only a few of them about each token. The router scores every
expert, keeps the best four, and weighs what they answer. Most of the weights of such a model lie in its experts, so
the way they are stored decides how much memory a machine needs and how fast it can read them. Four bits for a value and
eight bits for the scale that thirty-two neighbours share: that is the format in which these experts are published, and
they stay in it from the disk to the multiplication.
"""
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|call|>")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, help="where the checkpoint goes; must not exist yet")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default 0)")
    parser.add_argument("--config", type=Path, default=config_path("tiny", "config.json"), help="its config.json")


def run(args: argparse.Namespace) -> int:
    make_tiny(args.directory, json.loads(args.config.read_text()), args.seed)
    print(f"wrote {args.directory}")
    return 0


def make_tiny(directory: Path, config: dict[str, Any], seed: int = 0) -> None:
    """Write the checkpoint, whole or not at all. Raises FileExistsError if there is something under that name."""
    if directory.exists():
        raise FileExistsError(f"{directory} already exists: remove it or choose another name")
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        save_file(tensors(config, seed), draft / "model.safetensors", metadata={"format": "pt"})
        (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        (draft / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        write_tokenizer(draft, config["vocab_size"])
        draft.chmod(0o755)
        os.replace(draft, directory)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def tensors(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Every tensor of the checkpoint, scaled so that attention and experts each add as much as they are given.

    The output layer favours, for every token, one other token, its own embedding shuffled: without that the best of
    hundreds of random scores would often win by less than BF16 resolves, and no two programs would agree on it.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden, intermediate, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    experts, heads, kv_heads = config["num_local_experts"], config["num_attention_heads"], config["num_key_value_heads"]
    head = config["head_dim"]

    def normal(*shape: int, std: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).bfloat16()

    def packed(rows: int, k: int, std: float) -> tuple[Tensor, Tensor]:
        """Blocks uint8 [E, rows, K/32, 16] and scales uint8 [E, rows, K/32] of random codes, values' deviation near `std`."""
        middle = mxfp4.SCALE_BIAS + round(math.log2(std / 3))  # codes have a standard deviation near 3
        blocks = torch.randint(0, 256, (experts, rows, k // mxfp4.BLOCK, mxfp4.BLOCK // 2), generator=generator)
        scales = torch.randint(middle - 1, middle + 2, (experts, rows, k // mxfp4.BLOCK), generator=generator)
        return blocks.to(torch.uint8), scales.to(torch.uint8)

    embedding = normal(vocab, hidden, std=1.0)
    shuffled = embedding[torch.randperm(vocab, generator=generator)]
    state = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": normal(hidden, std=0.05) + 1,
        "lm_head.weight": ((shuffled.float() * OWN + normal(vocab, hidden, std=1.0)) * LOGITS / math.sqrt(hidden)).bfloat16(),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", heads * head), ("k", kv_heads * head), ("v", kv_heads * head)):
            state[f"{prefix}self_attn.{name}_proj.weight"] = normal(rows, hidden, std=hidden**-0.5)
            state[f"{prefix}self_attn.{name}_proj.bias"] = normal(rows, std=0.1)
        state[f"{prefix}self_attn.o_proj.weight"] = normal(hidden, heads * head, std=0.5 * (heads * head) ** -0.5)
        state[f"{prefix}self_attn.o_proj.bias"] = normal(hidden, std=0.1)
        state[f"{prefix}self_attn.sinks"] = normal(heads, std=1.0)
        state[f"{prefix}input_layernorm.weight"] = normal(hidden, std=0.05) + 1
        state[f"{prefix}post_attention_layernorm.weight"] = normal(hidden, std=0.05) + 1
        state[f"{prefix}mlp.router.weight"] = normal(experts, hidden, std=ROUTER * hidden**-0.5)
        state[f"{prefix}mlp.router.bias"] = normal(experts, std=0.1)
        for name, rows, k, gain in (("gate_up_proj", 2 * intermediate, hidden, 1.5), ("down_proj", hidden, intermediate, DOWN)):
            blocks, scales = packed(rows, k, std=gain * k**-0.5)
            state[f"{prefix}mlp.experts.{name}_blocks"] = blocks
            state[f"{prefix}mlp.experts.{name}_scales"] = scales
            state[f"{prefix}mlp.experts.{name}_bias"] = normal(experts, rows, std=0.2 * gain)
    return state


# Strength of the favoured token against chance, and the size of the logits: small enough that BF16, in which engines
# compute them, resolves a hundredth.
OWN, LOGITS, ROUTER, DOWN = 2.0, 0.05, 2.0, 0.6


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """A byte-level BPE over printable ASCII, as PreTrainedTokenizerFast loads it: what a random model says is readable."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=[*map(chr, range(33, 127)), "Ġ", "Ċ"],  # ByteLevel writes space and newline so
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"vocab_size {vocab_size} is too large for the text: only {tokenizer.get_vocab_size()} tokens come of it")
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[1],
        "pad_token": SPECIAL_TOKENS[1],
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n")
