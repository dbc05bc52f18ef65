# SPDX-License-Identifier: Apache-2.0
"""What a GPT-OSS takes on a card, from config.json alone: weights, computing, the KV cache, and what is left.

Weights and cache follow vLLM's own layouts (gpt_oss.py, v1/kv_cache_interface.py of 0.32). What computing takes is an
estimate: it comes within 3 % of the use before the KV cache that docs/benchmarks.md has of an H100. With INT8
dense layers an engine used 0.8 GiB (6 %) more than this, when codes took part of other layers' old blocks; not measured
since they don't.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_mxfp4_sm120.checkpoint.config import AttentionSizes, Sizes, longest_context, window
from vllm_mxfp4_sm120.mxfp4 import BLOCK

MIB, GIB = 1 << 20, 1 << 30
BF16, FP8 = 2, 1  # bytes a value
KV_BLOCK = 16  # tokens; vLLM's block on CUDA
CONTEXTS = (8192, 32768, 131072)
UTILIZATION = 0.92  # vLLM's --gpu-memory-utilization
DRIVER = 0.98  # of a card's nominal memory that CUDA has: 31.4 GiB of a 32 GB card
SYSTEM = 8 * GIB  # what Linux and its programs keep of memory that they share with the GPU
# The native backend's workspace (kernels/csrc/workspace.h, fp4/workspace.h): what its kernels keep, the most tokens of
# a launch, and the bytes of 64 activations as four FP4 terms.
KEPT, LAUNCH_TOKENS, RECORD = 6 << 20, 8192, 144
# A process's CUDA context with its libraries, and the CUDA graphs of vLLM's default sizes.
CONTEXT, GRAPHS = GIB // 2, GIB // 5


@dataclass(frozen=True)
class Layout:
    """What experts become in memory: the multiples that hidden and intermediate size are padded to, or BF16."""

    name: str
    hidden_multiple: int = BLOCK
    intermediate_multiple: int = BLOCK
    packed: bool = True

    def sizes(self, hidden: int, intermediate: int) -> tuple[int, int]:
        """Both after padding."""
        return round_up(hidden, self.hidden_multiple), round_up(intermediate, self.intermediate_multiple)


# The first is this plugin's, but for flashinfer_trtllm; the others are vLLM's oracle/mxfp4.py.
LAYOUTS = (
    Layout("native, triton, tiled"),
    Layout("flashinfer_trtllm", 256, 128),
    Layout("vLLM Marlin", 256, 128),
    Layout("vLLM Triton", 64, 64),
    Layout("upcast (BF16)", packed=False),
)
OURS = LAYOUTS[0]


@dataclass(frozen=True)
class Card:
    """`memory` is the nominal one in GB, as cards are sold; `fp4`: SM 12.x; `shared` is the system's memory, too."""

    memory: int
    name: str
    fp4: bool = False
    shared: bool = False

    @property
    def usable(self) -> int:
        """Bytes that vLLM takes by default."""
        if self.shared:
            return int((self.memory * 1e9 - SYSTEM) * UTILIZATION)
        return int(self.memory * GIB * DRIVER * UTILIZATION)

    @property
    def batched_tokens(self) -> int:
        """vLLM serve's --max-num-batched-tokens for a card of this size."""
        return 8192 if self.memory >= 70 else 2048


CARDS = (
    Card(16, "RTX 5080", fp4=True),
    Card(24, "RTX 4090"),
    Card(32, "RTX 5090", fp4=True),
    Card(48, "L40S"),
    Card(80, "H100"),
    Card(96, "RTX PRO 6000", fp4=True),
    Card(128, "GB10", fp4=True, shared=True),
)


@dataclass(frozen=True)
class Fit:
    """One row of the table. Bytes are a rank's; `requests` are those of this length that the cache holds at once.

    `dense` is the setting: int8 or, as by default, BF16.
    """

    card: str
    memory_gb: int
    tensor_parallel: int
    cache: str
    context: int
    weights: int
    working: int
    cache_of_request: int
    requests: int
    dense: str = "bf16"


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class Memory:
    """What one model takes. Raises ValueError for a config.json whose sizes make no sense."""

    def __init__(self, config: Mapping[str, Any], source: str = "config.json") -> None:
        self.sizes, self.attention = Sizes.from_config(config, source), AttentionSizes.from_config(config, source)
        # Null is the default: vLLM's own checks of a request's length then stand alone.
        given = {key: value for key, value in config.items() if value is not None}
        self.window, longest = window(config, source), longest_context(given, source)
        self.contexts = sorted({min(context, longest) for context in CONTEXTS})

    def experts(self, layout: Layout = OURS, tensor_parallel: int = 1) -> int:
        """All layers' experts on one rank, biases and padding included."""
        hidden, intermediate = layout.sizes(self.sizes.hidden_size, self.shard(tensor_parallel))
        values = 3 * hidden * intermediate
        weights = values * 17 // 32 if layout.packed else values * BF16
        return self.sizes.num_layers * self.sizes.num_experts * (weights + BF16 * (2 * intermediate + hidden))

    def shard(self, tensor_parallel: int) -> int:
        """A rank's intermediate size: whole blocks."""
        return round_up(self.sizes.intermediate_size, BLOCK * tensor_parallel) // tensor_parallel

    def vocabulary(self, tensor_parallel: int = 1) -> dict[str, int]:
        """Embedding and output layer on one rank: of vLLM's GPT-OSS two tables, also where they are tied."""
        matrix = self.attention.padded_vocab_size // tensor_parallel * self.sizes.hidden_size * BF16
        return {"embed_tokens": matrix, "lm_head": matrix}

    def dense(self, tensor_parallel: int = 1) -> int:
        """What `dense: int8` applies to, on one rank, in BF16: q, k, v, o of all layers, lm_head and the embedding."""
        heads, kv = self.attention.heads_of_rank(tensor_parallel)
        projections = 2 * self.sizes.hidden_size * (heads + kv) * self.attention.head_dim
        return self.sizes.num_layers * BF16 * projections + sum(self.vocabulary(tensor_parallel).values())

    def dense_int8(self, tensor_parallel: int = 1) -> int:
        """The same in 8 bits, with a BF16 scale for each 32 values."""
        return self.dense(tensor_parallel) * 17 // 32

    def attention_and_router(self, tensor_parallel: int = 1) -> int:
        """Projections, sinks, norms and routers of all layers on one rank."""
        hidden, dim = self.sizes.hidden_size, self.attention.head_dim
        heads, kv = self.attention.heads_of_rank(tensor_parallel)
        rows = (heads + 2 * kv) * dim
        projections = hidden * (rows + heads * dim) + rows + hidden
        router = self.sizes.num_experts * (hidden + 1)
        return self.sizes.num_layers * BF16 * (projections + heads + router + 2 * hidden) + BF16 * hidden

    def weights(self, layout: Layout = OURS, tensor_parallel: int = 1) -> int:
        """All of them on one rank."""
        rest = self.attention_and_router(tensor_parallel) + sum(self.vocabulary(tensor_parallel).values())
        return self.experts(layout, tensor_parallel) + rest

    def workspace(self, batched_tokens: int, tensor_parallel: int = 1, fp4: bool = False) -> int:
        """What the native backend keeps for calls of up to so many tokens; `fp4`: on a card with FP4 kernels."""
        hidden, shard, top_k = self.sizes.hidden_size, self.shard(tensor_parallel), self.sizes.top_k
        tokens = min(1 << (batched_tokens - 1).bit_length(), LAUNCH_TOKENS)
        slots = tokens * top_k
        arrays = [4 * slots] * 4 + [4 * (self.sizes.num_experts + 1), slots * hidden * BF16]  # routing, results
        if fp4:
            arrays += [tokens * -(-hidden // 64) * RECORD, slots * -(-shard // 64) * RECORD]
        else:
            arrays += [slots * shard * BF16]
        return KEPT + sum(round_up(array, 256) for array in arrays)

    def working(self, batched_tokens: int, requests: int = 256, tensor_parallel: int = 1, fp4: bool = False) -> int:
        """Context, graphs, the experts' workspace; residual and hidden state of the longest batch, or sampling."""
        states = batched_tokens * 2 * BF16 * self.sizes.hidden_size
        sampling = requests * self.attention.vocab_size * (4 + 4)  # logits and probabilities in FP32
        return CONTEXT + GRAPHS + self.workspace(batched_tokens, tensor_parallel, fp4) + max(states, sampling)

    def cache_of_request(
        self, tokens: int, batched_tokens: int, value_bytes: int = BF16, tensor_parallel: int = 1
    ) -> int:
        """Bytes that vLLM reserves on one rank for a request of so many tokens.

        Half of the layers see a window only, and free what lies behind it; what two steps, one computing and one being
        scheduled, may write is kept (`SlidingWindowSpec.max_admission_blocks_per_request`). Each group of layers has
        blocks of its own from one pool.
        """
        layers = self.sizes.num_layers
        page = KV_BLOCK * self.attention.heads_of_rank(tensor_parallel)[1] * 2 * self.attention.head_dim * value_bytes
        full = -(-tokens // KV_BLOCK)
        if self.window is None or layers == 1:
            return layers * page * full
        kept = min(self.window - 1 + 2 * batched_tokens, tokens)
        return -(-layers // 2) * page * (full + -(-kept // KV_BLOCK) + 1)

    def fits(self, layout: Layout = OURS) -> Iterator[Fit]:
        """Every card, alone and two of them, dense BF16 and INT8, BF16 and FP8 cache, every context of the model."""
        for card, ranks, dense in itertools.product(CARDS, (1, 2), ("bf16", "int8")):
            for cache, value_bytes in (("BF16", BF16), ("FP8", FP8)):
                for context in self.contexts:
                    yield self.fit(card, ranks, cache, value_bytes, context, layout, dense)

    def fit(
        self,
        card: Card,
        ranks: int,
        cache: str,
        value_bytes: int,
        context: int,
        layout: Layout = OURS,
        dense: str = "bf16",
    ) -> Fit:
        """One row; no requests where the weights alone are too large."""
        weights = self.weights(layout, ranks)
        if dense == "int8":
            weights -= self.dense(ranks) - self.dense_int8(ranks)
        working = self.working(card.batched_tokens, tensor_parallel=ranks, fp4=card.fp4)
        one = self.cache_of_request(context, card.batched_tokens, value_bytes, ranks)
        left = card.usable - weights - working
        return Fit(card.name, card.memory, ranks, cache, context, weights, working, one, max(0, left // one), dense)
