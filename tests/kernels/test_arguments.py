# SPDX-License-Identifier: Apache-2.0
"""Whatever the ops are given, they answer, or refuse it in one line. On the stub, which has the library's checks."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tests.kernels.building import in_a_new_process

CALLS = 3000


def mutated(tensor: Tensor, choose: random.Random) -> object:
    """The tensor with another shape, dtype, layout or address, or none at all."""
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: tensor.to(choose.choice((torch.float16, torch.float64, torch.int8, torch.int64, torch.bool))),
        lambda: tensor[:-1],
        lambda: tensor[..., :-1],
        lambda: tensor[:0],
        lambda: tensor[None],
        lambda: tensor.reshape(-1),
        lambda: torch.cat((tensor, tensor)),
        lambda: torch.cat((tensor, tensor), -1),
        lambda: torch.stack((tensor, tensor), -1)[..., 0],  # not contiguous
        lambda: torch.cat((tensor.new_zeros(1), tensor.reshape(-1)))[1:].view(tensor.shape),  # misaligned
        lambda: torch.tensor(0, dtype=tensor.dtype),
    ]
    return choose.choice(changes)()


def sizes(choose: random.Random) -> int:
    return choose.choice((-(1 << 63), -(1 << 32), -1, 0, 1, 3, 5, 8, 9, 256, 257, 1 << 16, 1 << 32, (1 << 63) - 1))


def fuzz(calls: int) -> None:
    """Each call with one to three arguments changed. Raises AssertionError for what is no answer and no refusal."""
    op, ops, choose = torch.ops.mxfp4_sm120.moe_layer, torch.ops.mxfp4_sm120, random.Random(0)
    x = torch.ones(3, 64, dtype=torch.bfloat16)
    right = {
        "x": x,
        "w13": torch.zeros(4, 2, 2, 544, dtype=torch.uint8),
        "w2": torch.zeros(4, 2, 1, 544, dtype=torch.uint8),
        "w13_bias": torch.zeros(4, 64, dtype=torch.bfloat16),
        "w2_bias": torch.zeros(4, 64, dtype=torch.bfloat16),
        "router_logits": torch.zeros(3, 4),
        "topk_ids": None,
        "topk_weights": None,
        "expert_map": torch.zeros(4, dtype=torch.int32),
        "num_experts": 4,
        "top_k": 2,
        "swiglu_oai": True,
        "config": 0,
    }
    ids = {"router_logits": None, "topk_ids": torch.zeros(3, 2, dtype=torch.int32), "topk_weights": torch.zeros(3, 2)}
    router = {"x": x, "weight": torch.ones(4, 64, dtype=torch.bfloat16), "bias": torch.ones(4, dtype=torch.bfloat16)}
    linear = {"x": x, "weight": torch.ones(5, 64, dtype=torch.bfloat16), "scale": None}
    linear |= {"bias": torch.ones(5, dtype=torch.bfloat16), "config": -1}
    int8 = {"weight": torch.ones(5, 64, dtype=torch.int8), "scale": x.new_ones(1, 5, 2), "config": 1}
    answered = refused = 0
    for _ in range(calls):
        call, given = choose.choice(
            (
                (op, right),
                (op, right | ids),
                (ops.router_logits, router),
                (ops.dense_linear, linear),
                (ops.dense_linear, linear | int8),
                (ops.dense_dequantize, {name: int8[name] for name in ("weight", "scale")}),
            )
        )
        given = dict(given)
        for name in choose.sample(list(given), choose.randint(1, min(3, len(given)))):
            value = given[name]
            given[name] = (
                mutated(value, choose) if isinstance(value, Tensor) else sizes(choose) if type(value) is int else value
            )
        try:
            out = call(**given)
        except RuntimeError as error:
            said = str(error)
            ours = said.startswith("mxfp4_sm120: ") and "expected" in said and "\n" not in said
            assert ours or isinstance(error, NotImplementedError), (said, given)  # torch's own, without any tensor
            refused += 1
        else:
            like = given["x" if "x" in given else "weight"]
            assert out.shape[0] == like.shape[0] and out.dtype == torch.bfloat16, given
            answered += 1
    for _ in range(calls):
        try:
            assert ops.workspace_bytes(*(sizes(choose) for _ in range(5))) > 0
        except RuntimeError as error:
            assert str(error).startswith("mxfp4_sm120: ") and " expected " in str(error) and "\n" not in str(error)
    assert answered > calls / 50 and refused > calls / 2, (answered, refused)
    print("answered or refused:", answered + refused)


def test_any_arguments(stub: Path):
    code = f"""
from tests.kernels.test_arguments import fuzz
library.load()
tuning.hand_over(torch.device("cpu"))
fuzz({CALLS})
"""
    result = in_a_new_process(stub, code, MXFP4_SM120_ALLOW_STUB_KERNEL="1")
    assert result.stdout.strip().endswith(f"answered or refused: {CALLS}"), result.stderr[-2000:]
