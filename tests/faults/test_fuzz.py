# SPDX-License-Identifier: Apache-2.0
"""Whatever a checkpoint's files hold: a ValueError of one line, or a checkpoint. FUZZ_ROUNDS=300 searches longer.

Every round has its own seed, the same ones at every start; hypothesis shrinks and prints what fails.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.faults.table import one_line
from tests.support.checkpoints import CONFIG, INDEX, SHARD, write_small
from vllm_mxfp4_sm120.checkpoint import (
    KEYS,
    Checkpoint,
    canonical_name,
    check_config,
    checked,
    read_headers,
    required_tensors,
)

ROUNDS = int(os.environ.get("FUZZ_ROUNDS", 4))  # of 100 examples, for each of the five tests

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.integers(-2, 200) | st.floats() | st.text(max_size=20)
) | st.sampled_from([10**30, 1e308, "yarn", "mxfp4", 7.0, 1e-5, "sliding_attention", "full_attention", SHARD])
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
ROPE_KEYS = [
    "rope_type",
    "type",
    "factor",
    "rope_theta",
    "beta_fast",
    "beta_slow",
    "truncate",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
    "partial_rotary_factor",
    "original_max_position_embeddings",
]
ROPE = st.dictionaries(st.sampled_from(ROPE_KEYS), SCALARS | JSON, max_size=8)
NAMES = st.text(max_size=30) | st.sampled_from([*required_tensors(CONFIG), "block.0.attn.qkv.weight", "a.lora_A.b"])


def search(test: Callable[[Any], None], strategy: st.SearchStrategy) -> None:
    """Each round shrinks what it finds."""
    rules = settings(
        max_examples=100, deadline=None, database=None, derandomize=False, suppress_health_check=list(HealthCheck)
    )
    for number in range(ROUNDS):
        seed(number)(rules(given(strategy)(test)))()


def refused(call: Callable[[], Any]) -> bool:
    try:
        call()
    except ValueError as error:
        one_line(error)
        return True
    return False


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fuzz") / "model"
    write_small(directory)
    return directory


def test_config_values() -> None:
    """What passes has a list of tensors."""
    changes = st.dictionaries(st.sampled_from([key.name for key in KEYS] + ["num_experts"]), JSON, max_size=3)
    rope = st.fixed_dictionaries({}, optional={"rope_scaling": ROPE, "rope_parameters": ROPE})
    quantization = st.fixed_dictionaries({}, optional={"quant_method": JSON, "group_size": JSON, "pack_layout": JSON})

    def test(drawn: tuple[dict, dict, dict]) -> None:
        changed, roped, packing = drawn
        config = {**CONFIG, **changed, **roped, **({"quantization_config": packing} if packing else {})}
        if not refused(lambda: check_config(config)):
            assert required_tensors(config)

    search(test, st.tuples(changes, rope, quantization))


def test_json_files(small: Path) -> None:
    """Bytes and broken JSON in place of config.json and the index."""
    texts = st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode())
    texts |= st.tuples(st.sampled_from([b"[", b'{"a":', b'"', b"1"]), st.integers(1, 20_000)).map(lambda t: t[0] * t[1])
    kept = {name: (small / name).read_bytes() for name in ("config.json", INDEX)}

    def test(drawn: tuple[str, bytes]) -> None:
        name, content = drawn
        (small / name).write_bytes(content)
        try:
            assert refused(lambda: Checkpoint(small))
        finally:
            (small / name).write_bytes(kept[name])

    search(test, st.tuples(st.sampled_from(sorted(kept)), texts))


def test_index(small: Path) -> None:
    weight_map = JSON | st.dictionaries(
        NAMES, SCALARS | st.sampled_from([SHARD, f"../{SHARD}", f"/{SHARD}"]), max_size=4
    )
    kept = (small / INDEX).read_bytes()

    def test(drawn: Any) -> None:
        (small / INDEX).write_text(json.dumps({"weight_map": drawn}))
        refused(lambda: read_headers(small))

    search(test, weight_map)
    (small / INDEX).write_bytes(kept)


def test_shards(tmp_path: Path) -> None:
    """A header of anything, before data of any length."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    sizes = st.integers(-1, 300)
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["U8", "BF16", "F32", "F4", "F8_E8M0", "BOOL", "I64", "X"]) | JSON,
            "shape": st.lists(sizes, max_size=3) | JSON,
            "data_offsets": st.tuples(sizes, sizes).map(list) | JSON,
        }
    )
    header = st.dictionaries(NAMES, entry | JSON, max_size=3).map(lambda value: json.dumps(value).encode())
    length = st.none() | st.integers(0, 400) | st.integers(0, 2**64 - 1)

    def test(drawn: tuple[bytes, int | None, bytes]) -> None:
        text, stated, data = drawn
        size = (len(text) if stated is None else stated).to_bytes(8, "little")
        (tmp_path / SHARD).write_bytes(size + text + data)
        assert refused(lambda: Checkpoint(tmp_path))

    search(test, st.tuples(header | st.binary(max_size=60), length, st.binary(max_size=300)))


def test_tensors_as_they_load() -> None:
    """Any name with any small tensor; a known name stays known."""
    dtypes = st.sampled_from(
        [torch.uint8, torch.bfloat16, torch.float32, torch.float8_e8m0fnu, torch.bool, torch.int64]
    )
    shapes = st.lists(st.sampled_from([0, 1, 2, 3, 16, 64, 96, 128]), max_size=4)

    def test(drawn: list[tuple[str, torch.dtype, list[int]]]) -> None:
        for name, *_ in drawn:
            published = canonical_name(name)
            assert published is None or canonical_name(published) == published
        weights = [(name, torch.zeros(shape).to(dtype)) for name, dtype, shape in drawn]
        assert refused(lambda: list(checked(weights, CONFIG)))

    search(test, st.lists(st.tuples(NAMES, dtypes, shapes), max_size=3))
