# SPDX-License-Identifier: Apache-2.0
"""`mxfp4-sm120 make-tiny DIR`: a GPT-OSS checkpoint small enough for a laptop, in the published layout.

Its sizes are those of configs/tiny/config.json, or with `--like` those of a published model (configs/models), to
measure loading and serving where the real one is not at hand. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_mxfp4_sm120 import config_path
from vllm_mxfp4_sm120.checkpoint import Sizes, Writer, check_config, published_config
from vllm_mxfp4_sm120.checkpoint.headers import read_json
from vllm_mxfp4_sm120.cli.ending import Outcome, WrongArguments
from vllm_mxfp4_sm120.cli.progress import Show, progress
from vllm_mxfp4_sm120.drafts import naming
from vllm_mxfp4_sm120.moe import MoEShape, MoEWeights, reference, topk_softmax
from vllm_mxfp4_sm120.mxfp4 import BLOCK, SCALE_BIAS

SEED = 0
EXAMPLES = """examples:
  mxfp4-sm120 make-tiny ./tiny
  mxfp4-sm120 make-tiny ./like-20b --like openai/gpt-oss-20b --layers 2

Its weights are random: its answers are always the same, and never make sense.
"""
# Keys that are written, though transformers would fill them in where they are missing.
WRITTEN = ("num_key_value_heads", "head_dim", "bos_token_id", "eos_token_id", "pad_token_id")
LIKE = ("openai/gpt-oss-20b", "openai/gpt-oss-120b")
# How much each part adds to the residual stream, whose embeddings have unit size, in a model of two layers. In a deeper
# one each layer adds less (`layer_gain`), or the embedding would drown: after 24 layers it was a seventh of the stream.
# The experts' first GEMM is loud enough that SwiGLU's clamps at 7 take part.
ATTENTION_GAIN, GATE_UP_GAIN, DOWN_GAIN = 0.5, 3.0, 0.8
# Two programs round differently, so nothing that is decided may be close. With plain random weights it often is: the
# best of hundreds of tokens wins by less than BF16 resolves, the fourth expert leads the fifth by as little, and a test
# that compares tokens would be a lottery. So the output layer favours one token after every other, by FAVOUR against
# chance, and the first dimensions of an embedding, one for each expert, hold the token's scores for them: nothing
# else writes there, the router reads nothing else, and the chosen lead the rest by a margin.
FAVOUR = 2.0
# What comes next must depend on the experts, or a test that compares tokens wouldn't see them: embedding and attention
# write the first half of the stream, the experts the second, and by that half the output layer knows which token to
# favour. What stands there is computed (`Stream`), for small vocabularies only: in larger ones the embedding decides.
DECIDED_BY_EXPERTS = 4096
# The size of the logits: BF16, in which engines compute them, resolves a hundredth only while they are below 2.
LOGIT_GAIN = 0.04

# Elements that a thread draws at once: their float32 stays in its cache, and Python is lost in the noise.
PIECE = 1 << 20

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
    parser.epilog = EXAMPLES
    parser.add_argument("directory", type=Path, help="where the checkpoint goes; must not exist yet")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the weights (default {SEED})")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--config", type=Path, default=config_path("tiny", "config.json"), help="its config.json")
    sizes.add_argument("--like", choices=LIKE, help="the full size of that model, with random weights")
    parser.add_argument("--layers", type=int, help="only so many layers")


def run(args: argparse.Namespace) -> Outcome:
    """Raises ValueError, OSError."""
    config = published_config(args.like) if args.like else own_config(args.config)
    if not 0 <= args.seed < 1 << 63:
        raise WrongArguments(f"--seed is {args.seed}, expected 0 to 2^63 - 1")
    if args.layers is not None:
        if not 1 <= args.layers <= config["num_hidden_layers"]:
            raise WrongArguments(f"--layers is {args.layers}, expected 1 to {config['num_hidden_layers']}")
        config["num_hidden_layers"] = args.layers
        if config.get("layer_types") is not None:
            config["layer_types"] = config["layer_types"][: args.layers]
    with progress("writing", unit="layers") as show:
        make_tiny(args.directory, config, args.seed, show)
    return Outcome([f"wrote {args.directory}"])


def make_tiny(directory: Path, config: dict[str, Any], seed: int = SEED, show: Show = lambda *_: None) -> None:
    """Write the checkpoint, whole or not at all, never more of it in memory than the embedding and a layer.

    Raises ValueError if `directory` exists and is not empty, or if its disk has no room.
    """
    need, free = checkpoint_bytes(config), free_on_disk(directory)
    if need > free:
        raise ValueError(f"{directory}: the checkpoint takes {need} bytes, {free} are free there; choose another disk")
    with Dice(seed) as dice, Writer(directory) as writer:
        embedding = embed(config, dice)
        writer.add("model.embed_tokens.weight", embedding)
        stream = Stream(config, embedding) if config["vocab_size"] <= DECIDED_BY_EXPERTS else None
        layers = config["num_hidden_layers"]
        for layer in range(layers):
            show(f"layer {layer}", layer, layers)
            tensors = dict(attention_and_router(config, dice))
            experts = random_experts(Sizes.from_config(config).layer, layer_gain(config), dice)
            if stream is not None:
                stream.add_layer(tensors, experts)
            for name, tensor in tensors.items():
                writer.add(f"model.layers.{layer}.{name}", tensor)
            writer.add_experts(layer, experts)
        show("the rest", layers, layers)
        norm = dice.normal(config["hidden_size"], std=0.05, mean=1.0)
        writer.add("model.norm.weight", norm)
        favoured = embedding if stream is None else stream.written_by_experts(norm)
        writer.add("lm_head.weight", output_layer(favoured, dice))
        writer.write_json("config.json", config)
        special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        writer.write_json("generation_config.json", special)
        with naming(directory):
            write_tokenizer(writer.draft, config["vocab_size"])


def own_config(path: Path) -> dict[str, Any]:
    """A config.json that a checkpoint can be made of. Raises ValueError."""
    config = read_json(path, "a config.json")
    check_config(config, str(path))
    if missing := [key for key in WRITTEN if config.get(key) is None]:
        raise ValueError(f"{path}: {', '.join(missing)} missing, expected as in the published config.json")
    if 2 * config["num_local_experts"] > config["hidden_size"]:
        experts, hidden = config["num_local_experts"], config["hidden_size"]
        raise ValueError(f"{path}: {experts} experts of a hidden size of {hidden}, expected at most half as many")
    return config


def checkpoint_bytes(config: dict[str, Any]) -> int:
    """Bytes of all tensors: packed experts, and everything else in BF16."""
    layer = Sizes.from_config(config).layer
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    projections = 2 * (config["num_attention_heads"] + config["num_key_value_heads"]) * config["head_dim"]
    biases = layer.num_experts * (2 * layer.intermediate_size + hidden)
    experts = layer.num_experts * layer.packed_bytes_per_expert
    per_layer = experts + 2 * (biases + hidden * (projections + layer.num_experts))
    return int(config["num_hidden_layers"] * per_layer + 2 * 2 * vocab * hidden)


def free_on_disk(directory: Path) -> int:
    """Of the disk on which `directory`, which need not exist, would lie."""
    there = next(parent for parent in (directory.absolute(), *directory.absolute().parents) if parent.is_dir())
    return shutil.disk_usage(there).free


class Dice:
    """Random tensors, the same for a seed however many threads fill them: every piece has a generator of its own."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.threads = ThreadPoolExecutor(initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self) -> Dice:
        return self

    def __exit__(self, *error: object) -> None:
        self.threads.shutdown()

    def _fill(self, tensor: Tensor, draw: Callable[[Tensor, torch.Generator], Any]) -> Tensor:
        pieces = tensor.view(-1).split(PIECE)
        seeds = torch.randint(1 << 62, (len(pieces),), generator=self.generator).tolist()
        list(self.threads.map(lambda piece, seed: draw(piece, torch.Generator().manual_seed(seed)), pieces, seeds))
        return tensor

    def normal(self, *shape: int, std: float, mean: float = 0.0) -> Tensor:
        """bf16 [shape]."""

        def draw(piece: Tensor, generator: torch.Generator) -> None:
            piece.copy_(torch.randn(len(piece), generator=generator).mul_(std).add_(mean))

        return self._fill(torch.empty(shape, dtype=torch.bfloat16), draw)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """uint8 [shape], from low to high - 1."""
        return self._fill(
            torch.empty(shape, dtype=torch.uint8),
            lambda piece, generator: piece.random_(low, high, generator=generator),
        )

    def bytes(self, *shape: int) -> Tensor:
        """uint8 [shape], a multiple of 8 of them: eight are drawn as one int64, from its smallest value on."""
        words = torch.empty(math.prod(shape) // 8, dtype=torch.int64)
        self._fill(words, lambda piece, generator: piece.random_(-(1 << 63), None, generator=generator))
        return words.view(torch.uint8).view(shape)


def embed(config: dict[str, Any], dice: Dice) -> Tensor:
    """bf16 [vocab, hidden]: scores for the experts, then noise, and nothing where the experts write."""
    embedding = dice.normal(config["vocab_size"], config["hidden_size"], std=1.0)
    embedding[:, : config["num_local_experts"]] = expert_scores(config, dice.generator)
    embedding[:, config["hidden_size"] // 2 :] = 0
    return embedding


def output_layer(favoured: Tensor, dice: Dice) -> Tensor:
    """bf16 [vocab, hidden], which for every token favours one other: `favoured` [vocab, hidden] is what is read.

    It holds those rows, shuffled. With plain random weights the best of hundreds of scores would often win by less than
    BF16 resolves, and no two programs would agree on it.
    """
    vocab, hidden = favoured.shape
    output = dice.normal(vocab, hidden, std=1.0)
    order = torch.randperm(vocab, generator=dice.generator)

    def favour(rows: Tensor, order: Tensor) -> None:
        rows.copy_((FAVOUR * favoured[order].float() + rows.float()) * (LOGIT_GAIN * hidden**-0.5))

    rows = PIECE // hidden
    list(dice.threads.map(favour, output.split(rows), order.split(rows)))
    return output


class Stream:
    """float32 [vocab, hidden], the residual stream of every token where attention sees that token alone.

    So the rotary embedding turns query and key alike and is left out, as is YaRN's factor: what is favoured need not be
    exact.
    """

    def __init__(self, config: dict[str, Any], embedding: Tensor) -> None:
        self.config, self.stream = config, embedding.float()

    def add_layer(self, tensors: dict[str, Tensor], experts: MoEWeights) -> None:
        def get(name: str) -> Tensor:
            return tensors[name].float()

        config = self.config
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        x = self._normed(get("input_layernorm.weight"))
        query, key, value = (
            (x @ get(f"self_attn.{name}_proj.weight").T + get(f"self_attn.{name}_proj.bias")).unflatten(1, (n, -1))
            for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        key, value = (tensor.repeat_interleave(heads // kv_heads, dim=1) for tensor in (key, value))
        score = (query * key).sum(dim=-1, keepdim=True) * config["head_dim"] ** -0.5
        share = torch.sigmoid(score - get("self_attn.sinks")[:, None])  # a softmax over this token and the sink
        attention = (share * value).flatten(1)
        self.stream += attention @ get("self_attn.o_proj.weight").T + get("self_attn.o_proj.bias")
        x = self._normed(get("post_attention_layernorm.weight"))
        logits = x @ get("mlp.router.weight").T + get("mlp.router.bias")
        ids, weights = topk_softmax(logits, config["num_experts_per_tok"])
        self.stream += reference(experts, x, ids, weights, dtype=torch.float32)

    def written_by_experts(self, norm: Tensor) -> Tensor:
        """What the output layer sees of it: the second half, as rows of unit size, less what all tokens share."""
        seen = self._normed(norm.float())
        seen = seen - seen.mean(dim=0)
        seen[:, : self.config["hidden_size"] // 2] = 0
        return seen / seen.square().mean(dim=1, keepdim=True).sqrt()

    def _normed(self, weight: Tensor) -> Tensor:
        return self.stream * torch.rsqrt(self.stream.square().mean(dim=1, keepdim=True) + 1e-5) * weight


def expert_scores(config: dict[str, Any], generator: torch.Generator) -> Tensor:
    """[vocab, experts]: every token likes `num_experts_per_tok` experts, each differently, and none of the others."""
    experts, chosen = config["num_local_experts"], config["num_experts_per_tok"]
    shape = (config["vocab_size"], experts)
    ranked = torch.cat((1.5 + torch.arange(chosen) / 2, torch.full((experts - chosen,), -1.0)))
    places = torch.rand(shape, generator=generator).argsort(dim=-1)
    return ranked[places] + 0.25 * torch.rand(shape, generator=generator)


def layer_gain(config: dict[str, Any]) -> float:
    """What a layer's outputs are multiplied with, so that all layers together add as much as two would with 1."""
    return math.sqrt(2 / config["num_hidden_layers"])


def attention_and_router(config: dict[str, Any], dice: Dice) -> Iterator[tuple[str, Tensor]]:
    """One layer's tensors other than its experts, by their names within the layer."""
    hidden, experts, head = config["hidden_size"], config["num_local_experts"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    for name, rows in (("q_proj", heads * head), ("k_proj", kv_heads * head), ("v_proj", kv_heads * head)):
        yield f"self_attn.{name}.weight", dice.normal(rows, hidden, std=hidden**-0.5)
        yield f"self_attn.{name}.bias", dice.normal(rows, std=0.1)
    out_std = layer_gain(config) * ATTENTION_GAIN * (heads * head) ** -0.5
    out, out_bias = dice.normal(hidden, heads * head, std=out_std), dice.normal(hidden, std=0.1)
    for tensor in (out, out_bias):
        tensor[:experts] = tensor[hidden // 2 :] = 0
    yield "self_attn.o_proj.weight", out
    yield "self_attn.o_proj.bias", out_bias
    yield "self_attn.sinks", dice.normal(heads, std=1.0)
    yield "input_layernorm.weight", dice.normal(hidden, std=0.05, mean=1.0)
    yield "post_attention_layernorm.weight", dice.normal(hidden, std=0.05, mean=1.0)
    yield "mlp.router.weight", torch.eye(experts, hidden, dtype=torch.bfloat16)
    yield "mlp.router.bias", dice.normal(experts, std=0.1)


def random_experts(shape: MoEShape, gain: float, dice: Dice) -> MoEWeights:
    """Experts of random codes, and of scales from three neighbouring powers of two that give each GEMM its gain."""

    def projection(rows: int, k: int, gain: float) -> tuple[Tensor, Tensor, Tensor]:
        middle = SCALE_BIAS + round(math.log2(gain * k**-0.5 / 3))  # random codes have a standard deviation near 3
        codes = dice.bytes(shape.num_experts, rows, k // 2)
        scales = dice.integers(middle - 1, middle + 2, shape.num_experts, rows, k // BLOCK)
        return codes, scales, dice.normal(shape.num_experts, rows, std=0.4 * gain)

    w13, w13_scale, w13_bias = projection(2 * shape.intermediate_size, shape.hidden_size, GATE_UP_GAIN)
    w2, w2_scale, w2_bias = projection(shape.hidden_size, shape.intermediate_size, gain * DOWN_GAIN)
    w2[:, : shape.hidden_size // 2], w2_bias[:, : shape.hidden_size // 2] = 0, 0
    return MoEWeights(w13, w13_scale, w2, w2_scale, w13_bias, w2_bias)


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """A byte-level BPE over printable ASCII, so that what a random model says can be read.

    Of a vocabulary larger than TEXT teaches, the rest stays without words.
    """
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
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[1],
        "pad_token": SPECIAL_TOKENS[1],
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n")
