# SPDX-License-Identifier: Apache-2.0
"""Which linear answers: what the proof's process measures, what is remembered of it, and what the operator does."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from machines import machine

from vllm_mxfp4_sm120 import proof
from vllm_mxfp4_sm120.backends.native import library
from vllm_mxfp4_sm120.checkpoint import published_config
from vllm_mxfp4_sm120.dense import linear as operator
from vllm_mxfp4_sm120.dense import native, plan, trial
from vllm_mxfp4_sm120.dense.int8 import Int8Weights
from vllm_mxfp4_sm120.dense.linear import TORCHS_OWN, LinearShape
from vllm_mxfp4_sm120.dense.plan import Timing

SHAPE = LinearShape(40, 128, int8=True)
TABLE = tuple(
    native.DenseConfiguration(name, name.startswith("int8"), tokens, 256, 0)
    for name, tokens in (("bf16_a", 16), ("int8_a", 64), ("int8_b", 64), ("int8_c", 1))
)
TIMINGS = [Timing(1, "int8_a", 5.0, 8.0), Timing(8, "int8_a", 6.0, 8.0), Timing(16, "int8_b", 7.0, 7.1)]
TIMINGS += [Timing(24, "int8_b", 7.0, 8.0), Timing(32, "int8_b", 9.0, 8.0)]


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[int, int]]:
    """Four of them, that are right, on a machine with none; the list has each call's tokens and kernel."""
    calls = []

    def linear(x, weight, bias=None, scale=None, kernel=-1):
        calls.append((len(x), kernel))
        exact = weight.double() if scale is None else Int8Weights(weight, scale).decode(dtype=torch.float64)
        return (x.double() @ exact.T + (0 if bias is None else bias.double())).bfloat16()

    monkeypatch.setattr(native, "configurations", lambda: TABLE)
    monkeypatch.setattr(native, "limits", lambda: native.Limits(256, 64))
    monkeypatch.setattr(native, "linear", linear)
    monkeypatch.setattr(native, "dequantize", lambda *weights: Int8Weights(*weights).decode(dtype=torch.bfloat16))
    monkeypatch.setattr(library, "load", lambda: "90-real")
    monkeypatch.setattr(library, "find", lambda capability: Path("_native.so"))
    monkeypatch.setattr(operator, "_kernels", {})
    monkeypatch.setenv("MXFP4_SM120_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("MXFP4_SM120_PROOF_SECONDS", raising=False)
    return calls


@pytest.mark.parametrize(
    ("tokens", "name"),
    [
        *((1, "int8_a"), (2, "int8_a"), (8, "int8_a"), (9, None), (16, None), (17, "int8_b"), (24, "int8_b")),
        *((25, None), (32, None), (33, None), (5000, None)),
    ],
)
def test_each_size_is_decided_by_the_next_that_was_measured(tokens: int, name: str | None, kernels: list) -> None:
    """And by more than two measurements of the same may differ by."""
    made = plan.Plan(None, {SHAPE: TIMINGS})
    assert made.name_at(SHAPE, tokens) == name
    made.serve()
    number = {config.name: number for number, config in enumerate(TABLE)}.get(name, TORCHS_OWN)
    assert operator.kernel_for(tokens, 40, 128, True) == number
    assert operator.kernel_for(tokens, 40, 128, False) == operator.kernel_for(tokens, 41, 128, True) == TORCHS_OWN


def test_in_words() -> None:
    made = plan.Plan(None, {SHAPE: TIMINGS})
    assert made.text(SHAPE) == (
        "int8_a at 1 to 8 tokens (6.0 us there, torch 8.0), int8_b at 17 to 24 tokens (7.0 us there, torch 8.0); "
        "else torch's linear"
    )
    slow = plan.Plan(None, {SHAPE: [Timing(1, "int8_a", 9.0, 8.0)]})
    assert slow.text(SHAPE) == "torch's linear, which was faster at every size"
    assert plan.Plan("no library").text(SHAPE) == "torch's linear: no library"
    assert made.text(LinearShape(64, 80, False)) == "torch's linear: no kernel takes 80 columns"


@pytest.mark.parametrize("leading", [(0,), (3,), (2, 4), (30,)])
@pytest.mark.parametrize("int8", [True, False])
def test_the_operator(leading: tuple[int, ...], int8: bool, kernels: list) -> None:
    """The kernel at the sizes that are its, torch's linear beyond: the same answers, and traced as one call."""
    plan.Plan(None, {LinearShape(40, 128, int8): TIMINGS[:2]}).serve()
    torch.manual_seed(0)
    weight, bias = torch.randn(40, 128).bfloat16(), torch.randn(40).bfloat16()
    encoded = Int8Weights.quantize(weight)
    given = (encoded.codes, encoded.scales, bias) if int8 else (weight, None, bias)
    x = torch.randn(*leading, 128).bfloat16()
    out = operator.linear(x, *given)
    exact = x.double() @ (encoded.decode(dtype=torch.float64) if int8 else weight.double()).T + bias.double()
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=0.1)
    tokens = x.numel() // 128
    assert kernels == ([(tokens, 1)] if tokens <= 8 else [])
    if len(leading) == 2:
        torch.library.opcheck(torch.ops.mxfp4_sm120.linear.default, (x, *given))


def solve(monkeypatch: pytest.MonkeyPatch, *shapes: LinearShape) -> proof.Proof:
    """With `int8_a` twice as fast as torch's, the others slower."""
    monkeypatch.setattr(trial, "TIMED", (1, 8))

    def microseconds(each, copies, device):
        times = {}
        for name, call in each.items():
            before = len(calls)
            call(copies[0])
            kernel = calls[-1][1] if len(calls) > before else None
            times[name] = {1: 4.0, None: 8.0}.get(kernel, 9.0)
        return times

    calls = []
    right = native.linear
    monkeypatch.setattr(native, "linear", lambda *given: calls.append((len(given[0]), given[4])) or right(*given))
    monkeypatch.setattr(trial, "microseconds", microseconds)
    return trial.solve([list(vars(shape).values()) for shape in shapes], "cpu")


def test_the_trial(monkeypatch: pytest.MonkeyPatch, kernels: list) -> None:
    """Every kernel that takes a shape at every size, and a choice that JSON can hold."""
    bf16 = LinearShape(70, 64, int8=False, bias=False)
    answer = solve(monkeypatch, SHAPE, bf16, LinearShape(70, 80, int8=False))
    assert answer == proof.Proof(None, found=json.loads(json.dumps(answer.found)))
    assert answer.found == {
        "40x128 int8": [[1, "int8_a", 4.0, 8.0], [8, "int8_a", 4.0, 8.0]],
        "70x64 bf16": [[1, "bf16_a", 9.0, 8.0], [8, "bf16_a", 9.0, 8.0]],
        "70x80 bf16": [],
    }
    assert {(tokens, kernel) for tokens in trial.CHECKED for kernel in range(4)} <= set(kernels)


def test_wrong_decoding_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "dequantize", lambda codes, scales: Int8Weights(codes, scales).decode().bfloat16() * 2)
    assert (
        solve(monkeypatch, SHAPE).reason
        == f"{SHAPE}: wrong numbers: INT8 weights decoded to BF16 aren't what torch makes of them"
    )


def test_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Microseconds of a call, each over all copies of the weights: a kernel that sleeps is as slow as it sleeps."""
    right = native.linear
    monkeypatch.setattr(native, "linear", lambda *given, **more: time.sleep(2e-3) or right(*given, **more))
    copies = [trial.Problem.random(SHAPE, "cpu")] * 3
    times = trial.times_at(4, copies)
    assert times.keys() == {"torch", "int8_a", "int8_b", "int8_c"}
    assert trial.times_at(5, copies).keys() == {"torch", "int8_a", "int8_b"}, "int8_c would read the weights five times"
    assert times["int8_a"] > 2000 > times["torch"] > 0


def with_row_off(out):
    out[:, 7] *= 1.01
    return out


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda out: out * 1.5,
            "40x128 int8: wrong numbers: relative error 0.5 at 7 tokens, int8_b, expected at most",
        ),
        (with_row_off, "int8_b, expected at most"),
        (lambda out: out * torch.nan, "relative error nan at 7 tokens"),
        (lambda out: out[:, :5], "int8_b answered torch.bfloat16 [7, 5]"),
    ],
)
def test_one_wrong_kernel_at_some_sizes_is_enough(monkeypatch: pytest.MonkeyPatch, damage, reason: str) -> None:
    right = native.linear
    wrong = lambda *given: damage(right(*given)) if given[4] == 2 and len(given[0]) % 2 == 1 else right(*given)  # noqa: E731
    monkeypatch.setattr(native, "linear", wrong)
    monkeypatch.setattr(trial, "CHECKED", (4, 7, 33))
    answer = solve(monkeypatch, SHAPE)
    assert reason in answer.reason and answer.final and answer.found is None


def test_a_kernel_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*given):
        raise RuntimeError("out of memory\nmore")

    monkeypatch.setattr(native, "linear", raises)
    assert solve(monkeypatch, SHAPE) == proof.Proof("RuntimeError: out of memory", final=False)


ODD = LinearShape(40, 50, True)
LAYERS = {"qkv_proj": SHAPE, "o_proj": ODD, "other": SHAPE}
FOUND = proof.Proof(None, found={str(SHAPE): [list(vars(timing).values()) for timing in TIMINGS], str(ODD): []})


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> list:
    """What the proof's process answers, the last again and again; and then what it was asked."""
    answers = [FOUND]
    monkeypatch.setattr(proof, "device", lambda machine: "cuda:0")
    monkeypatch.setattr(proof, "run_in_child", lambda *task: answers.append(task) or answers[0])
    return answers


def test_the_card_is_asked_once(child: list) -> None:
    """Of each shape; then the record is read, by whoever starts next."""
    first = plan.make(LAYERS, machine("H100"))
    assert first.timings == {SHAPE: TIMINGS, ODD: []} and first == plan.make(LAYERS, machine("H100"))
    first.serve()
    assert operator._kernels.keys() == {(40, 128, True)}
    task = {"shapes": [[40, 50, True, True], [40, 128, True, True]], "device": "cuda:0"}
    assert child[1:] == [(f"{trial.__name__}:{trial.solve.__name__}", task, 300)]
    plan.make(LAYERS, machine("H100").__class__((9, 0), (13, 0), "H200"))
    assert len(child) == 3


def test_what_went_wrong_is_remembered_too(child: list) -> None:
    child[0] = proof.Proof("wrong numbers")
    assert plan.make(LAYERS, machine("H100")) == plan.Plan("wrong numbers")
    again = plan.make(LAYERS, machine("H100"))
    assert again.reason.startswith("wrong numbers (remembered; ") and len(child) == 2
    again.serve()
    assert operator.kernel_for(1, 40, 128, True) == TORCHS_OWN


@pytest.mark.parametrize("found", [None, {}, [], "x", {"40x128 int8": [[1, 2]]}, {"40x128 int8": 3}])
def test_a_record_of_something_else(child: list, found: object) -> None:
    child[0] = proof.Proof(None, found=found)
    assert "its record can't be read" in plan.make(LAYERS, machine("H100")).reason


def test_where_nothing_is_asked(child: list, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nothing is timed (MXFP4_SM120_PROOF)" in plan.make(LAYERS, machine("H100"), prove=False).reason
    assert plan.make(LAYERS, machine("cpu")).reason == "it needs an NVIDIA GPU"
    assert "has no BF16 tensor cores" in plan.make(LAYERS, machine("T4")).reason
    assert "is built for 90-real, not for sm_120" in plan.make(LAYERS, machine("RTX 5090")).reason
    monkeypatch.setattr(library, "find", lambda capability: None)
    assert "isn't built" in plan.make(LAYERS, machine("H100")).reason
    assert len(child) == 1


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [(1, [(5120, 2880), (2880, 4096), (201088, 2880)]), (16, [(384, 2880), (2880, 256), (12568, 2880)])],
)
def test_the_layers_of_gpt_oss(ranks: int, expected: list) -> None:
    """As vLLM shards them: KV heads are repeated where there are fewer than ranks."""
    found = plan.shapes(published_config("gpt-oss-20b"), ranks, int8=False)
    assert [(shape.rows, shape.columns) for shape in found.values()] == expected
    assert [shape.bias for shape in found.values()] == [True, True, False]


def test_layers_that_are_no_whole_blocks() -> None:
    """Two heads of 40 a rank: o_proj stays BF16. Rows may be any number, and vLLM pads the vocabulary."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 40, "vocab_size": 1001}
    found = plan.shapes({**published_config("gpt-oss-20b"), **heads, "hidden_size": 96}, 2, int8=True)
    assert {name: str(shape) for name, shape in found.items()} == {
        "qkv_proj": "160x96 int8",
        "o_proj": "96x80 bf16",
        "lm_head": "512x96 int8",
    }
