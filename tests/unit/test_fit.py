# SPDX-License-Identifier: Apache-2.0
"""What a model takes, against vLLM's own accounting of its KV cache and against the figures of docs/benchmarks.md."""

from __future__ import annotations

import pytest

from vllm_mxfp4_sm120.checkpoint import published_config, required_tensors
from vllm_mxfp4_sm120.fit import BF16, CARDS, FP8, GIB, LAYOUTS, Memory
from vllm_mxfp4_sm120.packing.pack import nbytes

SMALL, LARGE = published_config("openai/gpt-oss-20b"), published_config("openai/gpt-oss-120b")
THIRD = {**LARGE, "num_hidden_layers": 12, "layer_types": LARGE["layer_types"][:12]}
LAYOUT = {layout.name: layout for layout in LAYOUTS}
OURS, MARLIN = "native, triton, tiled", "vLLM Marlin"

# GiB of weights that vLLM 0.32 reported on H100s and, for two ranks, H200s: docs/benchmarks.md.
MEASURED = [
    (SMALL, OURS, 1, 12.85),
    (SMALL, MARLIN, 1, 13.80),
    (SMALL, "vLLM Triton", 1, 13.03),
    (SMALL, "upcast (BF16)", 1, 39.1),
    (SMALL, OURS, 2, 6.52),
    (THIRD, OURS, 1, 21.73),
    (THIRD, MARLIN, 1, 23.51),
]


@pytest.mark.parametrize(("config", "layout", "ranks", "gib"), MEASURED)
def test_weights_are_what_was_measured(config: dict, layout: str, ranks: int, gib: float) -> None:
    assert Memory(config).weights(LAYOUT[layout], ranks) / GIB == pytest.approx(gib, rel=0.03)


def test_int8_weights_are_what_was_measured() -> None:
    memory = Memory(SMALL)
    assert (memory.weights() - memory.dense() + memory.dense_int8()) / GIB == pytest.approx(11.28, rel=0.005)


def test_use_before_the_cache_and_its_tokens_are_what_was_measured() -> None:
    """An H100 of 79.2 GiB, 0.4 of them for vLLM, batches of 16384 tokens: 14.2 GiB, then 378,030 tokens."""
    memory = Memory(SMALL)
    before = memory.weights() + memory.working(16384)
    assert before / GIB == pytest.approx(14.2, rel=0.03)
    tokens = (0.4 * 79.2 * GIB - before) / memory.cache_of_request(8192, 16384) * 8192
    assert tokens == pytest.approx(378_030, rel=0.03)


@pytest.mark.parametrize("config", [SMALL, LARGE], ids=["20b", "120b"])
def test_unpadded_weights_are_the_tensors_of_the_checkpoint(config: dict) -> None:
    assert Memory(config).weights() == sum(nbytes(info) for info in required_tensors(config).values())
    tied = {**config, "tie_word_embeddings": True}
    assert Memory(tied).weights() == Memory(config).weights()  # vLLM has both tables


def test_padding_is_that_of_vllms_oracle() -> None:
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import Mxfp4MoeBackend as Backend
    from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import mxfp4_round_up_hidden_size_and_intermediate_size

    for shard in (2880, 1440, 736):
        for name, backend in ((MARLIN, Backend.MARLIN), ("vLLM Triton", Backend.TRITON)):
            theirs = mxfp4_round_up_hidden_size_and_intermediate_size(backend, 2880, shard)
            assert LAYOUT[name].sizes(2880, shard) == theirs
    assert LAYOUT[MARLIN].sizes(2880, 2880) == (3072, 2944)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("value_bytes", "dtype"), [(BF16, "bfloat16"), (FP8, "float8_e4m3fn")])
@pytest.mark.parametrize("context", [8192, 8200, 32768, 131072])
@pytest.mark.parametrize("config", [SMALL, LARGE, {**SMALL, "num_hidden_layers": 7}], ids=["20b", "120b", "odd"])
def test_cache_is_what_vllm_reserves(config: dict, context: int, value_bytes: int, dtype: str, ranks: int) -> None:
    """vLLM's own groups and its own sum over them."""
    pytest.importorskip("vllm")
    import torch
    from vllm.v1.core.kv_cache_utils import _max_memory_usage_bytes_from_groups, get_kv_cache_groups
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    heads = {"block_size": 16, "num_kv_heads": 8 // ranks, "head_size": 64, "dtype": getattr(torch, dtype)}
    specs = {
        f"{layer}": SlidingWindowSpec(**heads, sliding_window=128) if layer % 2 == 0 else FullAttentionSpec(**heads)
        for layer in range(config["num_hidden_layers"])
    }
    groups = get_kv_cache_groups(vllm_config(context, 2048), specs)
    assert sorted(len(group.layer_names) for group in groups) == sorted(
        (config["num_hidden_layers"] // 2, -(-config["num_hidden_layers"] // 2))
    )
    expected = _max_memory_usage_bytes_from_groups(vllm_config(context, 2048), groups)
    assert Memory(config).cache_of_request(context, 2048, value_bytes, ranks) == expected


def vllm_config(context: int, batched_tokens: int):
    """What vLLM's accounting reads of its configuration; two batches are in flight, as with async scheduling."""
    from types import SimpleNamespace

    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=context),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: SimpleNamespace(is_block_outermost=False)),
        speculative_config=None,
        attention_config=SimpleNamespace(hisparse_config=None),
        max_in_flight_tokens=2 * batched_tokens,
    )


def test_what_fits_where() -> None:
    """Of the table, what people ask first."""

    def requests(config: dict, memory: int, context: int, ranks: int = 1, cache: str = "BF16") -> int:
        return next(
            row.requests
            for row in Memory(config).fits()
            if (row.memory_gb, row.context, row.tensor_parallel, row.cache) == (memory, context, ranks, cache)
        )

    assert requests(SMALL, 16, 8192) >= 1 and requests(SMALL, 16, 131072) == 0
    assert requests(SMALL, 32, 131072) >= 1
    assert requests(LARGE, 48, 8192) == 0 and requests(LARGE, 32, 8192, ranks=2) == 0
    assert requests(LARGE, 80, 32768) >= 1 and requests(LARGE, 96, 131072) >= 1
    assert requests(SMALL, 24, 32768, cache="FP8") >= 2 * requests(SMALL, 24, 32768) - 1
    assert [card.memory for card in CARDS] == [16, 24, 32, 48, 80, 96, 128]
