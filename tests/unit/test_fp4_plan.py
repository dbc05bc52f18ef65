# SPDX-License-Identifier: Apache-2.0
"""When activations become FP4 terms: what the proof's process finds, what is remembered, what the layer then calls."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from machines import GPT_OSS, install, machine

from vllm_mxfp4_sm120 import proof, selector, settings
from vllm_mxfp4_sm120.backends import tuning
from vllm_mxfp4_sm120.backends.native import Native, fp4, library
from vllm_mxfp4_sm120.backends.tuning import Family
from vllm_mxfp4_sm120.bench import models
from vllm_mxfp4_sm120.cli import doctor
from vllm_mxfp4_sm120.cli.__main__ import main
from vllm_mxfp4_sm120.cli.activations import Activations
from vllm_mxfp4_sm120.fp4 import plan, trial
from vllm_mxfp4_sm120.fp4.plan import BF16
from vllm_mxfp4_sm120.moe import MoEShape
from vllm_mxfp4_sm120.tune import gpu, session
from vllm_mxfp4_sm120.tune.session import Timed
from vllm_mxfp4_sm120.tune.sizes import Size

TABLE = tuple(
    fp4.Configuration(f"terms{terms}_tokens{tokens}", terms, tokens, 128, 1024)
    for terms in (1, 2, 3, 4)
    for tokens in (64, 128)
)
RTX_5090 = machine("RTX 5090")
SMALL, LARGE = "terms4_tokens64", "terms4_tokens128"


def found(bf16: dict[int, float], four: dict[int, tuple[float, float]], wrong: dict[str, str] | None = None) -> dict:
    """What the child answers: microseconds by tokens of BF16, and of both kernels of four terms.

    Those of three take a third less, those of two half.
    """
    times = []
    for tokens, us in bf16.items():
        by_kernel = {BF16: us}
        for terms, part in ((4, 1.0), (3, 2 / 3), (2, 0.5)):
            by_kernel |= {f"terms{terms}_tokens{64 * (i + 1)}": part * each for i, each in enumerate(four[tokens])}
        times.append([tokens, by_kernel])
    errors = {BF16: 2.6e-3, **{config.name: 1e-3 * 10 ** (4 - config.terms) for config in TABLE[2:]}}
    return {"errors": errors, "wrong": wrong or {}, "times": times}


# Small blocks of tokens win at 512, large ones beyond.
FASTER = found({128: 100, 512: 200, 1024: 400, 8192: 3000}, {128: (120, 130), 512: (180, 190), 1024: (300, 200),
                                                            8192: (2000, 1500)})  # fmt: skip
CROSSED = ((511, BF16), (512, SMALL), (math.inf, LARGE))


@pytest.fixture(autouse=True)
def child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list:
    """An RTX 5090 with a library that has FP4 kernels; what its proof's process answers, and then what it was asked."""
    answers = [proof.Proof(None, found=FASTER)]
    install(monkeypatch)
    monkeypatch.setattr(fp4, "architectures", lambda: "120f-real")
    monkeypatch.setattr(fp4, "configurations", lambda: TABLE)
    monkeypatch.setattr(proof, "device", lambda machine: "cuda:0")
    monkeypatch.setattr(proof, "run_in_child", lambda *task: answers.append(task) or answers[0])
    monkeypatch.setenv("MXFP4_SM120_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("PROOF_SECONDS", "ACTIVATION", "PROOF", "BACKEND"):
        monkeypatch.delenv(f"MXFP4_SM120_{name}", raising=False)
    return answers


def times(*four: float) -> dict:
    """Of 256, 512, ... tokens, beside 100 us of BF16."""
    sizes = [256 << i for i in range(len(four))]
    return found(dict.fromkeys(sizes, 100.0), {size: (each, each) for size, each in zip(sizes, four, strict=True)})


@pytest.mark.parametrize(
    ("answer", "lines"),
    [
        (FASTER, CROSSED),
        (times(99, 99, 50), ((1023, BF16), (math.inf, SMALL))),
        (times(98, 98, 98), ((255, BF16), (math.inf, SMALL))),
        (times(50, 101, 97), ((1023, BF16), (math.inf, SMALL))),
        (times(50, 50, 99), ((math.inf, BF16),)),
        (times(200, 200, 200), ((math.inf, BF16),)),
    ],
    ids=["two kernels", "margin", "everywhere", "with a gap", "not at the largest", "nowhere"],
)
def test_from_the_smallest_number_of_tokens_on_from_which_it_pays(child: list, answer: dict, lines: tuple) -> None:
    child[0] = proof.Proof(None, found=answer)
    made = plan.make(RTX_5090, GPT_OSS, "bf16")
    assert made.reason is None and made.lines == lines
    layer = Native(GPT_OSS)
    layer.fp4_kernels = made.kernels
    numbers = {config.name: number for number, config in enumerate(TABLE)}
    for tokens in (1, 255, 256, 511, 512, 513, 1023, 1024, 8192, 20000):
        name = next(kernel for most, kernel in lines if tokens <= most)
        assert layer.fp4_kernel(tokens) == numbers.get(name)


def test_in_words(child: list) -> None:
    assert str(plan.make(RTX_5090, GPT_OSS, "bf16")) == "4 FP4 terms from 512 tokens on, else BF16"
    assert str(plan.make(RTX_5090, GPT_OSS, "mxfp4x2")) == "2 FP4 terms from 128 tokens on, else BF16"
    gap = plan.Plan(None, 4, ((63, BF16), (99, SMALL), (127, LARGE), (255, BF16), (math.inf, SMALL)))
    assert str(gap) == "4 FP4 terms at 64 to 127 tokens and from 256 tokens on, else BF16"
    assert str(plan.Plan(None, 4, ((math.inf, BF16),))) == "BF16 (4 FP4 terms weren't faster)"


WRONG = "wrong numbers: relative error 0.3 at 7 tokens, routed, expected at most 0.01"
DECISIONS = [  # activation, machine, what is different -> the kernel at 1024 tokens, or why none
    ("bf16", "RTX 5090", {}, LARGE),
    ("mxfp4x3", "RTX 5090", {}, "terms3_tokens128"),
    ("mxfp4x2", "RTX 5090", {}, "terms2_tokens128"),
    ("off", "RTX 5090", {}, "activation is off"),
    ("bf16", "GB10", {}, LARGE),
    ("bf16", "H100", {}, "the FP4 kernels are built for 120f-real, not for sm_90"),
    ("bf16", "H100", {"built": "120f-real 90-real"}, LARGE),  # the twin
    ("bf16", "RTX 5090", {"built": ""}, "the CUDA library has no FP4 kernels"),
    ("bf16", "RTX 5090", {"prove": False}, "without a proof no FP4 kernel answers (MXFP4_SM120_PROOF)"),
    ("bf16", "RTX 5090", {"wrong": {SMALL: WRONG}}, f"{SMALL}: {WRONG}"),
    ("mxfp4x3", "RTX 5090", {"wrong": {SMALL: WRONG}}, "terms3_tokens128"),
    ("bf16", "RTX 5090", {"wrong": {"terms2_tokens64": WRONG}}, LARGE),
    ("mxfp4x2", "RTX 5090", {"wrong": {"terms2_tokens64": WRONG}}, f"terms2_tokens64: {WRONG}"),
]


@pytest.mark.parametrize(("activation", "card", "different", "answer"), DECISIONS)
def test_decisions(
    child: list, monkeypatch: pytest.MonkeyPatch, activation: str, card: str, different: dict, answer: str
) -> None:
    monkeypatch.setattr(fp4, "architectures", lambda: different.get("built", "120f-real"))
    child[0] = proof.Proof(None, found=FASTER | {"wrong": different.get("wrong", {})})
    made = plan.make(machine(card), GPT_OSS, activation, different.get("prove", True))
    if made.reason is not None:
        assert made.reason.startswith(answer) and made.kernels == ()
        assert len(child) == (2 if different.get("wrong") else 1), "nothing is tried where nothing could come of it"
    else:
        assert next(kernel for most, kernel in made.lines if most >= 1024) == answer


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (proof.Proof("its process died (killed by SIGABRT): trap", final=False), "its process died"),
        (proof.Proof("no answer within 300 s (MXFP4_SM120_PROOF_SECONDS)", final=False), "no answer within 300 s"),
        *((proof.Proof(None, found=junk), "its record can't be read") for junk in (
            None, {}, [], "x", FASTER | {"times": 3}, FASTER | {"times": [[64, {BF16: 1.0}]]}, FASTER | {"wrong": 3}
        )),
    ],
)  # fmt: skip
def test_what_goes_wrong_costs_nothing_else(child: list, answer: proof.Proof, reason: str) -> None:
    child[0] = answer
    choice = selector.select(RTX_5090, GPT_OSS)
    assert choice.backend is Native and choice.layer(GPT_OSS).fp4_kernels == ()
    assert choice.activations.reason.startswith(reason)
    assert choice.tells_activations and str(choice.activations) == f"BF16 ({choice.activations.reason})"
    with pytest.raises(ValueError) as error:
        selector.select(RTX_5090, GPT_OSS, selector.Request(activation="mxfp4x2"))
    assert str(error.value).startswith(f"MXFP4_SM120_ACTIVATION asks for mxfp4x2, which can't be had: {reason}")


def test_the_card_is_asked_once(child: list) -> None:
    """For every setting; then the record is read, by whoever starts next. Another shape is another question."""
    first = plan.make(RTX_5090, GPT_OSS, "bf16")
    assert first == plan.make(RTX_5090, GPT_OSS, "bf16") and first.trial.errors[BF16] == 2.6e-3
    plan.make(RTX_5090, GPT_OSS, "mxfp4x2")
    problem = asdict(proof.problem_shape(RTX_5090, GPT_OSS))
    asked = {"layer": asdict(GPT_OSS), "problem": problem, "device": "cuda:0"}
    assert child[1:] == [(f"{trial.__name__}:{trial.solve.__name__}", asked, 300)]
    assert json.loads(json.dumps(asked)) == asked
    inspect.signature(trial.solve).bind(**asked)
    plan.make(RTX_5090, MoEShape(32, 32, 2880, 1440, 4), "bf16")
    assert len(child) == 3


def write_rule(rule: list[dict], version: str | None = None) -> Path:
    path = tuning.user_path("RTX 5090")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"fp4": version or library.version(), "fp4_rule": rule}))
    return path


def test_what_tune_has_measured_says_where() -> None:
    """For four terms, in tokens of each shape; other versions' and bad ones are left out."""
    write_rule([{"kernel": BF16, "tokens_per_expert": 40}, {"kernel": LARGE, "tokens": 8192}, {"kernel": BF16}])
    assert plan.make(RTX_5090, GPT_OSS, "bf16").lines == ((320, BF16), (math.inf, LARGE))
    assert plan.make(RTX_5090, MoEShape(128, 128, 2880, 2880, 4), "bf16").lines == ((1280, BF16), (math.inf, LARGE))
    assert plan.make(RTX_5090, GPT_OSS, "mxfp4x3").lines[0] == (127, BF16)
    write_rule([{"kernel": LARGE}], version="another")
    assert plan.make(RTX_5090, GPT_OSS, "bf16").lines == CROSSED
    for bad in ("terms1_tokens128", "terms3_tokens128", "decode"):
        write_rule([{"kernel": bad}])
        assert plan.make(RTX_5090, GPT_OSS, "bf16").lines == CROSSED


def test_what_tune_has_measured_does_not_make_a_wrong_kernel_right(child: list) -> None:
    write_rule([{"kernel": LARGE}])
    child[0] = proof.Proof(None, found=FASTER | {"wrong": {LARGE: WRONG}})
    assert plan.make(RTX_5090, GPT_OSS, "bf16").kernels == ()


def slower_below(border: float):
    """A timer: FP4 kernels are 10 % slower below so many tokens an expert, 10 % faster from there on."""

    def timer(family: Family, size: Size, kernels: list[str]) -> Timed:
        fp4 = 110.0 if size.tokens_per_expert < border else 90.0
        return Timed({name: [{BF16: 100.0, SMALL: 1.05 * fp4}.get(name, fp4)] * 5 for name in kernels})

    return timer


def test_tune_measures_from_how_many_tokens_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rule for both models, in the card's file, from where a start takes it; a second run finds nothing to move."""
    both = [models.model("20b"), models.model("120b")]
    [job] = gpu.fp4_jobs(RTX_5090, both)
    assert job.kernels(job.sizes[0]) == [BF16, SMALL, LARGE]
    assert {size.model for size in job.sizes} == {"20b", "120b"} and job.sizes[-1].tokens == 8192
    outcomes = session.run([job], slower_below(50), session.Notebook(None, {}), lambda *_: None)
    session.write(tuning.user_path("RTX 5090"), session.contents_of("RTX 5090", "here", outcomes, {}))
    for model, most in (("20b", 400), ("120b", 1600)):
        made = plan.make(RTX_5090, models.model(model).experts, "bf16")
        (border, first), *rest = made.lines
        assert first == BF16 and most <= border + 1 < 1.2 * most and rest == [(math.inf, LARGE)]
    [again] = gpu.fp4_jobs(RTX_5090, both)
    assert again.rule == outcomes[0].decision.rule and len(again.sizes) > len(job.sizes)
    [nothing] = session.run([again], slower_below(50), session.Notebook(None, {}), lambda *_: None)
    assert all(change.after != BF16 for change in nothing.decision.changes)


def test_tune_takes_the_models_that_proved_themselves(monkeypatch: pytest.MonkeyPatch, child: list) -> None:
    """One whose layer is too large for the card doesn't keep the other's from being timed."""

    def no_memory_for_120b(solver: str, task: dict, seconds: float) -> proof.Proof:
        full = task["layer"]["num_experts"] == 128
        return proof.Proof("OutOfMemoryError: CUDA out of memory", final=False) if full else child[0]

    monkeypatch.setattr(proof, "run_in_child", no_memory_for_120b)
    [job] = gpu.fp4_jobs(RTX_5090, [models.model("20b"), models.model("120b")])
    assert {size.model for size in job.sizes} == {"20b"}


@pytest.mark.parametrize("reason", ["wrong numbers", None])
def test_nothing_is_tuned_that_is_not_right(monkeypatch: pytest.MonkeyPatch, child: list, reason: str | None) -> None:
    if reason is None:
        monkeypatch.setattr(fp4, "architectures", lambda: "")
    child[0] = proof.Proof(reason)
    assert gpu.fp4_jobs(RTX_5090, [models.model("20b")]) == []


def test_doctor_says_which_and_shows_the_times(monkeypatch: pytest.MonkeyPatch, capsys, child: list) -> None:
    monkeypatch.setattr(doctor, "examine", lambda **_: report)
    report = doctor.Report({"driver": "580.95.05"}, "RTX 5090 (sm_120)", library="120f-real", library_version="0123")
    report.fp4, report.weights = "120f-real", {"gpt-oss-20b": 1}
    child[0] = proof.Proof(None, found=FASTER | {"wrong": {"terms3_tokens64": WRONG}})
    choice = selector.select(RTX_5090, GPT_OSS)
    report.chosen, report.activations = {"gpt-oss-20b": "native"}, {"gpt-oss-20b": Activations.of(choice)}
    assert main(["doctor", "--report"]) == 0
    printed = capsys.readouterr().out
    assert "CUDA library  built for 120f-real, version 0123\n              FP4 kernels for 120f-real\n" in printed
    assert "activations of the experts: 4 FP4 terms from 512 tokens on, else BF16" in printed
    table = printed[printed.index("microseconds of a layer of gpt-oss-20b") :].splitlines()
    assert table[1].split() == ["tokens", BF16, *(f"terms{i}_tokens{j}" for i in (4, 3, 2) for j in (64, 128))]
    assert table[3].split()[:4] == ["512", "200.0", "180.0", "190.0"]
    assert table[6].split()[:3] == ["error", "2.6e-03", "1.0e-03"]
    assert table[7] == f"terms3_tokens64: {WRONG}"
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["activations"]["gpt-oss-20b"]["trial"]
    assert found["times"][1] == {"tokens": 512, "by_kernel": FASTER["times"][1][1]}


ASKED = "MXFP4_SM120_ACTIVATION asks for mxfp4x2, which can't be had: "


@pytest.mark.parametrize(
    ("card", "installed", "built", "reason"),
    [
        ("H100", {}, "120f-real", "the FP4 kernels are built for 120f-real, not for sm_90"),
        (
            "RTX 5090",
            {},
            "",
            "the CUDA library has no FP4 kernels: they take nvcc 12.8 or newer, and a build for SM 12.x",
        ),
        ("cpu", {}, "120f-real", "tiled answers, and only native has FP4 kernels"),
        ("RTX 5090", {"failing": {"native": "wrong"}}, "120f-real", "triton answers, and only native has FP4 kernels"),
    ],
)
def test_terms_that_cannot_be_had_are_an_error(
    monkeypatch: pytest.MonkeyPatch, card: str, installed: dict, built: str, reason: str
) -> None:
    install(monkeypatch, **installed)
    monkeypatch.setattr(fp4, "architectures", lambda: built)
    monkeypatch.setenv("MXFP4_SM120_ACTIVATION", "mxfp4x2")
    with pytest.raises(ValueError) as error:
        selector.select(machine(card), GPT_OSS, selector.Request.from_user())
    assert str(error.value) == ASKED + reason
    monkeypatch.setenv("MXFP4_SM120_ACTIVATION", "bf16")
    choice = selector.select(machine(card), GPT_OSS, selector.Request.from_user())
    assert choice.tells_activations == (choice.backend is Native and card == "RTX 5090")


def test_the_layer_calls_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the shape of its input, on all its ways in; biases, routing and expert map go along."""
    calls = []
    ops = {
        name: lambda *given, name=name: calls.append((name, given[-1], given[8])) or given[0]
        for name in ("moe_layer", "fp4_moe_layer")
    }
    monkeypatch.setattr(torch.ops, "mxfp4_sm120", SimpleNamespace(**ops), raising=False)
    layer = selector.select(RTX_5090, GPT_OSS).layer(GPT_OSS)
    prepared = {"w13": torch.empty(0), "w2": torch.empty(0)}
    expert_map = torch.arange(32)
    for tokens in (0, 511, 512, 513, 9000):
        x, logits = torch.empty(tokens, 32), torch.empty(tokens, 32)
        layer.forward_logits(prepared, x, logits)
        layer.forward(prepared, x, torch.zeros(tokens, 4, dtype=torch.int64), torch.empty(tokens, 4), expert_map)
    numbers = [*([("moe_layer", -1)] * 4), *([("fp4_moe_layer", 6)] * 2), *([("fp4_moe_layer", 7)] * 4)]
    assert [(name, config) for name, config, _ in calls] == numbers
    assert [given is None for *_, given in calls] == [True, False] * 5
    off = selector.select(RTX_5090, GPT_OSS, selector.Request(activation="off")).layer(GPT_OSS)
    off.forward_logits(prepared, x, logits)
    assert calls[-1][:2] == ("moe_layer", -1)


def test_batches_that_must_not_change_an_answer(child: list) -> None:
    """No kernel is chosen by the number of tokens, so the card isn't asked; terms can't be had."""
    made = selector.select(RTX_5090, GPT_OSS, selector.Request(batch_invariant=True))
    assert made.batch_invariant and made.activations.kernels == () and len(child) == 1
    assert str(made.activations) == (
        "BF16 (VLLM_BATCH_INVARIANT=1 wants the same kernel whatever the number of tokens)"
    )
    with pytest.raises(ValueError, match="asks for mxfp4x2, which can't be had: VLLM_BATCH_INVARIANT=1 wants the same"):
        selector.select(RTX_5090, GPT_OSS, selector.Request(activation="mxfp4x2", batch_invariant=True))


def test_every_setting_but_off_has_its_terms() -> None:
    values = settings.ACTIVATION.kind.accepted.removeprefix("one of ").split(", ")
    assert {*values} == {*plan.TERMS, plan.OFF} and min(plan.TERMS.values()) == 2
    assert trial.TOLERANCE.keys() == {*plan.TERMS.values()}
