# SPDX-License-Identifier: Apache-2.0
"""Two small models that are none of this plugin's business, of random weights: a dense one and one of experts."""

from __future__ import annotations

import json
from pathlib import Path

import torch

VOCAB = 256
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest that vLLM's CPU attention takes
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # of BF16's 3 digits enough in each logit that tokens aren't a lottery
}


def make_neighbours(directory: Path) -> dict[str, Path]:
    """Write both and return their folders by name."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    experts = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=128)),
        "qwen3_moe": Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **experts, intermediate_size=128)),
    }
    for name, model in models.items():
        model.bfloat16().save_pretrained(directory / name)
        generation = directory / name / "generation_config.json"
        generation.write_text(json.dumps({"eos_token_id": None}))
    return {name: directory / name for name in models}
