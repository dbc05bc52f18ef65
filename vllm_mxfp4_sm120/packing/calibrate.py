# SPDX-License-Identifier: Apache-2.0
"""What the experts' weights are multiplied by when the model reads a text: the mean square of every input.

The model runs a layer at a time: transformers' attention, then this package's experts, one after the other, so that
memory is needed for an expert and the text's hidden states, whatever the model's size.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vllm_mxfp4_sm120.checkpoint.config import SLIDING
from vllm_mxfp4_sm120.checkpoint.names import EMBEDDING, layer_of
from vllm_mxfp4_sm120.checkpoint.tensors import expert_prefix
from vllm_mxfp4_sm120.moe import Activation, activate, topk_softmax
from vllm_mxfp4_sm120.packing.manifest import Progress
from vllm_mxfp4_sm120.packing.source import Source

ROW, ROWS = 1024, 8  # tokens of a piece of the text, and how many pieces; each of 128 experts then sees 256 tokens


@torch.no_grad()
def second_moments(
    source: Source, text: str, device: torch.device, progress: Progress = lambda *_: None
) -> dict[str, Tensor]:
    """float32 [E, K] for each projection of each layer, by its published prefix.

    An expert that no token of the text goes to has the mean of the others. Raises ValueError for an empty text, or if
    transformers isn't installed.
    """
    ids = _tokens(source.directory, text)
    hidden = torch.nn.functional.embedding(ids, source.rest(EMBEDDING)).to(device, torch.float32)
    moments: dict[str, Tensor] = {}
    for layer in range(source.sizes.num_layers):
        progress(f"layer {layer}", layer, source.sizes.num_layers)
        hidden = hidden + _attention(source, layer, hidden)
        normed = _norm(hidden, source.rest(f"model.layers.{layer}.post_attention_layernorm.weight"))
        moe, seen = _experts(source, layer, normed.flatten(0, 1))
        hidden = hidden + moe.view_as(hidden)
        moments |= seen
    return moments


def _tokens(directory: Path, text: str) -> Tensor:
    """[rows, tokens] of one length, as much of the text as is used."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ValueError("--calibrate needs transformers, which isn't installed; pip install transformers") from error
    ids = AutoTokenizer.from_pretrained(directory)(text, verbose=False).input_ids[: ROW * ROWS]
    if not ids:
        raise ValueError("the text to calibrate with is empty, expected some 8,000 tokens of what the model is for")
    length = min(ROW, len(ids))
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight.to(x), eps=1e-5)


def _attention(source: Source, layer: int, hidden: Tensor) -> Tensor:
    """transformers' eager attention of one layer, its input norm before it."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

    settings = {key: value for key, value in source.config.items() if key != "quantization_config"}
    config = GptOssConfig.from_dict(settings)
    config._attn_implementation = "eager"
    attention = GptOssAttention(config, layer).to(hidden)
    prefix = f"model.layers.{layer}.self_attn."
    names = [name for name in source.tensors if layer_of(name) == layer and name.startswith(prefix)]
    attention.load_state_dict({name.removeprefix(prefix): source.rest(name) for name in names})
    length = hidden.shape[1]
    positions = torch.arange(length, device=hidden.device)
    behind = positions[:, None] - positions
    hide = behind < 0
    if config.layer_types[layer] == SLIDING and config.sliding_window is not None:
        hide |= behind >= config.sliding_window
    mask = torch.zeros_like(behind, dtype=hidden.dtype).masked_fill(hide, torch.finfo(hidden.dtype).min)
    rotary = GptOssRotaryEmbedding(config).to(hidden.device)(hidden, positions[None])
    normed = _norm(hidden, source.rest(f"model.layers.{layer}.input_layernorm.weight"))
    return torch.cat([attention(row[None], rotary, mask[None, None])[0] for row in normed])


def _experts(source: Source, layer: int, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """x [M, H] -> the layer's output [M, H], and the moments of both projections' inputs."""
    router = f"model.layers.{layer}.mlp.router"
    weight, bias = (source.rest(f"{router}.{kind}").to(x) for kind in ("weight", "bias"))
    topk_ids, topk_weights = topk_softmax(torch.nn.functional.linear(x, weight, bias), source.sizes.top_k)
    biases = {name: source.bias(layer, name).to(x) for name in ("gate_up_proj", "down_proj")}
    out = torch.zeros_like(x)
    seen: dict[str, list[Tensor | None]] = {name: [] for name in biases}
    for expert in range(source.sizes.num_experts):
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        if not len(token):
            for each in seen.values():
                each.append(None)
            continue
        w13, w2 = (source.weights(layer, name, expert, x.device).to(x) for name in biases)
        inner = activate(x[token] @ w13.T + biases["gate_up_proj"][expert], Activation.SWIGLU_OAI)
        down = inner @ w2.T + biases["down_proj"][expert]
        out.index_add_(0, token, down * topk_weights[token, slot, None].to(x))
        seen["gate_up_proj"].append(x[token].square().mean(0))
        seen["down_proj"].append(inner.square().mean(0))
    return out, {expert_prefix(layer, name): _filled(each) for name, each in seen.items()}


def _filled(moments: list[Tensor | None]) -> Tensor:
    mean = torch.stack([each for each in moments if each is not None]).mean(0)
    return torch.stack([mean if each is None else each for each in moments]).cpu()
