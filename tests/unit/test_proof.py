# SPDX-License-Identifier: Apache-2.0
"""Proof before use: backends that are wrong, raise, hang or die are skipped and named, and the answer is remembered."""

import subprocess
import time
from dataclasses import replace

import faulty
import pytest
import torch

from vllm_mxfp4_sm120 import config_path, proof, selector
from vllm_mxfp4_sm120.backends import registry, tuning
from vllm_mxfp4_sm120.backends.tiled import Tiled
from vllm_mxfp4_sm120.moe import Activation, MoEShape
from vllm_mxfp4_sm120.platform import Machine

CPU = Machine(None, None)
GPT_OSS = MoEShape(32, 32, 2880, 2880, 4)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MXFP4_SM120_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("MXFP4_SM120_PROOF_SECONDS", raising=False)
    selector.select.cache_clear()
    yield tmp_path / "cache"
    selector.select.cache_clear()


def test_each_native_kernel_has_its_turn():
    rule = tuning.read(config_path("tuning", "default.json"))
    chosen = set()
    for tokens in proof.TOKENS:
        per_expert = tokens * GPT_OSS.top_k / proof.EXPERTS
        holds = (bound for bound in rule if tokens <= bound.tokens and per_expert <= bound.tokens_per_expert)
        chosen.add(next(holds).kernel)
    assert chosen == {bound.kernel for bound in rule}


@pytest.mark.parametrize(
    "backend, reason",
    [
        (faulty.Wrong, "wrong numbers: relative error 0.0"),
        (faulty.Misroutes, "wrong numbers: relative error 0.65 at 1 tokens, the router, expected at most 0.01;"),
        (faulty.Raises, "RuntimeError: no kernel image is available;"),
        (faulty.Hangs, "no answer within 1 s (MXFP4_SM120_PROOF_SECONDS);"),
        (faulty.Kills, "its process died (killed by SIGSEGV): it said nothing;"),
    ],
)
def test_a_faulty_backend_is_skipped_and_named(backend, reason, monkeypatch):
    if backend is faulty.Hangs:
        monkeypatch.setenv("MXFP4_SM120_PROOF_SECONDS", "1")
    monkeypatch.setattr(registry, "REGISTRY", (registry.Entry(backend.name, "", (0,)), registry.find("tiled")))
    monkeypatch.setattr(registry, "load", {backend.name: backend, "tiled": Tiled}.__getitem__)
    start = time.monotonic()
    choice = selector.select(CPU, GPT_OSS)
    assert choice.backend is Tiled and time.monotonic() - start < 60
    remembered = proof.recall(proof.record_path(backend, CPU, GPT_OSS))
    assert (remembered is not None) == (backend not in (faulty.Hangs, faulty.Kills))
    assert f"{choice};".startswith(f"MXFP4 experts on cpu (cpu): tiled; not {backend.name}: {reason}")
    # Asked for by name, it's an error instead.
    with pytest.raises(
        ValueError, match=f"^MXFP4_SM120_BACKEND asks for a backend that can't be used: {backend.name}: "
    ):
        selector.select(CPU, GPT_OSS, selector.Request(backend.name, "MXFP4_SM120_BACKEND"))


def no_child(*arguments, **options):
    raise AssertionError("a child process was started")


def test_the_answer_is_remembered(cache, monkeypatch):
    assert proof.why_not(faulty.Good, CPU, GPT_OSS) is None
    bad = proof.why_not(faulty.Raises, CPU, GPT_OSS)
    monkeypatch.setattr(subprocess, "Popen", no_child)
    assert proof.why_not(faulty.Good, CPU, GPT_OSS) is None
    assert (
        proof.why_not(faulty.Raises, CPU, GPT_OSS) == f"{bad} (remembered; `mxfp4-sm120 doctor --forget` tries again)"
    )
    assert proof.forget() == 2
    with pytest.raises(AssertionError, match="a child process was started"):
        proof.why_not(faulty.Good, CPU, GPT_OSS)


@pytest.mark.parametrize(
    ("message", "final"),
    [
        ("CUDA error: no kernel image is available for execution on the device", True),
        ("CUDA error: an illegal instruction was encountered", True),
        ("CUDA error: invalid device function", True),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", False),
        ("CUDA driver error: out of memory", False),
        ("Triton Error [CUDA]: CUDA_ERROR_OUT_OF_MEMORY", False),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", False),
        ("CUDA error: all CUDA-capable devices are busy or unavailable", False),
        ("ptxas: No space left on device", False),
    ],
)
@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError, MemoryError, OSError])
def test_only_a_missing_kernel_is_final(message, final, kind, monkeypatch):
    def raises(*arguments):
        raise kind(message)

    monkeypatch.setattr(faulty.Good, "forward", raises)
    assert proof.solve(faulty.Good, replace(GPT_OSS, hidden_size=96, intermediate_size=160), "cpu") == proof.Proof(
        f"{kind.__name__}: {message}", final
    )


def test_a_record_is_for_one_machine_and_one_set_of_versions(monkeypatch):
    card = Machine((12, 0), (12, 8), "RTX 5090")
    paths = {
        proof.record_path(faulty.Good, CPU, GPT_OSS),
        proof.record_path(faulty.Wrong, CPU, GPT_OSS),
        proof.record_path(faulty.Good, card, GPT_OSS),
        proof.record_path(faulty.Good, replace(card, cuda=(13, 0)), GPT_OSS),
        proof.record_path(faulty.Good, replace(card, name="RTX PRO 6000"), GPT_OSS),
        proof.record_path(faulty.Good, card, replace(GPT_OSS, intermediate_size=736)),
        proof.record_path(faulty.Good, card, replace(GPT_OSS, has_bias=False)),
        proof.record_path(faulty.Good, card, replace(GPT_OSS, local_experts=16)),
    }
    monkeypatch.setattr(proof.record, "driver", lambda: "590.1")
    paths.add(proof.record_path(faulty.Good, card, GPT_OSS))
    monkeypatch.setattr(proof.record, "version", lambda name: "9.9")
    paths.add(proof.record_path(faulty.Good, card, GPT_OSS))
    assert len(paths) == 10
    # 20b and 120b differ in what the proof doesn't look at.
    assert proof.record_path(faulty.Good, card, GPT_OSS) == proof.record_path(
        faulty.Good, card, MoEShape(128, 128, 2880, 2880, 4)
    )


def test_plain_torch_is_proved_in_place(monkeypatch, cache):
    monkeypatch.setattr(subprocess, "Popen", no_child)
    assert proof.why_not(Tiled, CPU, GPT_OSS) is None
    assert not cache.exists()


@pytest.mark.parametrize(
    "shape",
    [
        MoEShape(4, 4, 64, 64, 2, has_bias=False, activation=Activation.SILU),
        MoEShape(8, 4, 96, 160, 2),
        MoEShape(8, 8, 96, 160, 8),
    ],
)
def test_the_problem_suits_every_shape(shape):
    answer = proof.solve(Tiled, shape, "cpu")
    assert answer.reason is None and 0 < answer.found["error"] <= Tiled.tolerance
    reason = proof.solve(faulty.NotANumber, shape, "cpu").reason
    assert reason == "wrong numbers: relative error nan at 1 tokens, routed, expected at most 0.01"


def test_the_problem():
    small = proof.problem_shape(CPU, GPT_OSS)
    assert small.hidden_size // 32 % 4 and small.intermediate_size // 32 % 4 and small.has_bias
    on_card = proof.problem_shape(Machine((12, 0), (12, 8), "RTX 5090"), replace(GPT_OSS, local_experts=16))
    assert (on_card.num_experts, on_card.local_experts, on_card.hidden_size) == (40, 20, 2880)
    with torch.device("meta"):  # as vLLM makes its layers, under another default device
        assert proof.why_not(Tiled, CPU, GPT_OSS) is None
    _, logits = proof.random_inputs(small, 150, "cpu")
    chosen = logits.topk(small.top_k).indices
    assert (chosen == 1).any(1).all() and not (chosen == 0).any()
