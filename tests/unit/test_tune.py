# SPDX-License-Identifier: Apache-2.0
"""tune on made-up times: no run leaves anything half done. test_tune_decide.py: what follows from the times."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from machines import NOT_BUILT, install, machine

from vllm_mxfp4_sm120 import config_path
from vllm_mxfp4_sm120.backends import tuning
from vllm_mxfp4_sm120.backends.native import library
from vllm_mxfp4_sm120.backends.native import tuning as native_tuning
from vllm_mxfp4_sm120.backends.tiled import Tiled
from vllm_mxfp4_sm120.backends.tuning import Bound, Family
from vllm_mxfp4_sm120.bench import measure, models
from vllm_mxfp4_sm120.cli import tune
from vllm_mxfp4_sm120.cli.__main__ import main
from vllm_mxfp4_sm120.platform import Machine
from vllm_mxfp4_sm120.proof import timing
from vllm_mxfp4_sm120.tune import gpu
from vllm_mxfp4_sm120.tune.decide import serving
from vllm_mxfp4_sm120.tune.session import Job, Timed
from vllm_mxfp4_sm120.tune.sizes import Size

pytestmark = pytest.mark.usefixtures("home")
CARD = "NVIDIA GeForce RTX 5090"
SHIPPED = tuning.read(config_path("tuning", "default.json"))
RULE = (Bound("a", tokens=8), Bound("b", tokens_per_expert=16), Bound("c"))


def size(tokens: int) -> Size:
    """4 of 32 experts a token: tokens_per_expert is tokens / 8."""
    return Size("20b", tokens, 32, 4)


# The command, with times from here.


class Clock:
    """Kernel "b" is faster from 9 tokens on; `fails` by kernel, Ctrl-C after so many sizes."""

    def __init__(self, stop_after: int = 1000, fails: dict[str, str] | None = None) -> None:
        self.stop_after, self.fails, self.asked = stop_after, fails or {}, []

    def __call__(self, family: Family, asked: Size, kernels: list[str]) -> Timed:
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.append((family, asked.tokens))
        microseconds = {kernel: 90.0 if kernel == "a" and asked.tokens > 8 else 100.0 for kernel in kernels}
        return Timed(
            {kernel: [time] * 5 for kernel, time in microseconds.items() if kernel not in self.fails},
            {kernel: why for kernel, why in self.fails.items() if kernel in kernels},
        )


def jobs(version: str = "v1") -> list[Job]:
    sizes = tuple(size(tokens) for tokens in (4, 8, 9, 12, 100))
    return [
        Job(Family.NATIVE, version, RULE, sizes, lambda asked: ["a", "b", "c", "d"]),
        Job(Family.TRITON, "3.9", (Bound("t"),), sizes[:2], lambda asked: ["t", "u"]),
    ]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch):
    """Sets the clock for the next run."""

    def use(clock: Clock, version: str = "v1") -> Clock:
        monkeypatch.setattr(tune, "bench", lambda args: (CARD, jobs(version), clock))
        return clock

    return use


def test_a_whole_run(here, capsys: pytest.CaptureFixture[str]) -> None:
    clock = here(Clock(fails={"d": "wrong numbers: relative error 0.5, expected at most 0.01"}))
    assert main(["tune"]) == 0
    said = capsys.readouterr()
    path = tuning.user_path(CARD)
    written = json.loads(path.read_text())
    assert written["for"] == CARD and written["library"] == "v1" and written["triton"] == "3.9"
    assert written["rule"] == [
        {"kernel": "a", "tokens": 100},
        {"kernel": "b", "tokens_per_expert": 16},
        {"kernel": "c"},
    ]
    assert written["triton_rule"] == [{"kernel": "t"}]
    assert "20b, 9 tokens           b -> a, 1.111 times as fast" in said.out
    assert "left out: d, 4 tokens of 20b: wrong numbers" in said.out and f"wrote {path}" in said.out
    assert "triton 3.9: 2 sizes timed, 0 get another kernel" in said.out
    assert "tuning done: 7 of 7 sizes" in said.err and len(clock.asked) == 7
    found = tuning.find(CARD, Family.NATIVE, "v1", lambda *_: None)
    assert found.path == path and serving(found.rule, size(12), {"a": 1, "b": 1}) == "a"
    assert not list((path.parents[2] / "cache").rglob("*.json"))  # nothing is left to go on with
    again = here(Clock())
    assert main(["tune", "--json"]) == 0 and len(again.asked) == 7
    report = json.loads(capsys.readouterr().out)
    assert report["path"] == str(path) and report["families"]["library"]["changes"][0]["after"] == "a"


EARLIER = {
    "for": CARD,
    "library": "v0",
    "rule": [{"kernel": "c"}],
    "fp4": "v0",
    "fp4_rule": [{"kernel": "x"}],
    "new": 1,
}


@pytest.mark.parametrize(
    ("earlier", "stays", "line"),
    [
        (
            json.dumps(EARLIER),
            {"fp4": "v0", "fp4_rule": [{"kernel": "x"}], "new": 1},
            "fp4 v0: not timed now, its rule of ",
        ),
        (
            json.dumps(EARLIER | {"for": "H100"}),
            {},
            "nothing of {path} stays: {name} is for another card (H100, this is",
        ),
        ("[1", {}, "nothing of {path} stays: {name} is no rule: "),
    ],
    ids=["this card's", "another card's", "damaged"],
)
def test_what_an_earlier_run_has_found(here, capsys, earlier: str, stays: dict, line: str) -> None:
    """Stays where nothing was timed now, or the loss is said."""
    here(Clock())
    path = tuning.user_path(CARD)
    path.parent.mkdir(parents=True)
    path.write_text(earlier)
    assert main(["tune", "--dry-run"]) == 0
    line = line.format(path=path, name=path.name)
    assert line in capsys.readouterr().out and path.read_text() == earlier
    assert main(["tune", "--json"]) == 0
    written = json.loads(path.read_text())
    assert [each.startswith(line) for each in json.loads(capsys.readouterr().out)["before"]] == [True]
    assert {key: written.get(key) for key in ("fp4", "fp4_rule", "new") if key in written} == stays
    assert written["library"] == "v1" and written["rule"][0] == {"kernel": "a", "tokens": 100}


def test_ctrl_c_and_on_from_there(here, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here(Clock(stop_after=3))
    assert main(["tune"]) == 130
    said = capsys.readouterr()
    assert said.out == "" and "tune: stopped; what was timed is kept in" in said.err
    assert not tuning.user_path(CARD).exists() and len(list((home / "cache").rglob("*.*"))) == 2  # notes, their lock
    clock = here(Clock())
    assert main(["tune"]) == 0
    assert [tokens for _, tokens in clock.asked] == [12, 100, 4, 8]
    stopped = tuning.user_path(CARD).read_text()
    tuning.user_path(CARD).unlink()
    here(Clock())
    assert main(["tune"]) == 0 and tuning.user_path(CARD).read_text() == stopped


def test_two_at_once(here, capsys: pytest.CaptureFixture[str]) -> None:
    """They would falsify each other's times. The first isn't disturbed by the second."""
    clock = here(Clock())
    statuses = []

    def with_another(*arguments: object) -> Timed:
        if not statuses:
            statuses.append(main(["tune"]))
        return Clock.__call__(clock, *arguments)

    here(with_another)
    assert main(["tune", "--json"]) == 0 and statuses == [1] and len(clock.asked) == 7
    said = capsys.readouterr()
    assert json.loads(said.out)["path"] == str(tuning.user_path(CARD))
    assert "another process is writing it, expected none; wait for it" in said.err


@pytest.mark.parametrize("place", ["a file", "nowhere"])
def test_where_nothing_can_be_kept(place: str, here, home: Path, monkeypatch, capsys) -> None:
    clock = here(Clock(stop_after=3))
    (home / "cache").write_text("in the way")
    if place == "nowhere":
        monkeypatch.setattr(tune, "cache_dir", lambda: None)
    assert main(["tune"]) == 130
    said = capsys.readouterr().err
    assert "nothing is kept of a run that is stopped: " in said and said.endswith("mxfp4-sm120 tune: stopped\n")
    assert len(clock.asked) == 3


DAMAGE = {
    "cut short": lambda text: text[:-1],
    "a list": lambda text: "[1]",
    "braces without end": lambda text: "[" * 100_000,
    "no notes": lambda text: text.replace('"notes": {', '"notes": 3, "x": {'),
    "notes that are none": lambda text: re.sub(r'("library 20b \d+": )\{.*?\}\}', r"\1 [1]", text),
    "a time of 0": lambda text: text.replace("100.0", "0.0"),
    "a time below 0": lambda text: text.replace("100.0", "-1.0"),
    "a time that is none": lambda text: text.replace("100.0", "NaN"),
    "a round too few": lambda text: text.replace("[100.0, ", "["),
    "no rounds": lambda text: re.sub(r"\[100.*?\]", "[]", text),
    "words for times": lambda text: text.replace("100.0", '"fast"'),
}


@pytest.mark.parametrize("why", ["other kernels", "--again", *DAMAGE])
def test_what_was_timed_is_forgotten(why: str, here, home: Path) -> None:
    here(Clock(stop_after=3))
    assert main(["tune"]) == 130
    [notes] = (home / "cache").rglob("*.json")
    if why in DAMAGE:
        damaged = DAMAGE[why](notes.read_text())
        assert damaged != notes.read_text()
        notes.write_text(damaged)
    clock = here(Clock(), "v2" if why == "other kernels" else "v1")
    assert main(["tune", *([why] if why == "--again" else [])]) == 0
    assert len(clock.asked) == 7


def test_a_dry_run_writes_no_rule_and_keeps_the_times(here, capsys: pytest.CaptureFixture[str]) -> None:
    here(Clock())
    assert main(["tune", "--dry-run"]) == 0
    assert f"would write {tuning.user_path(CARD)}" in capsys.readouterr().out
    assert not tuning.user_path(CARD).parent.exists()
    clock = here(Clock())
    assert main(["tune"]) == 0 and clock.asked == [] and tuning.user_path(CARD).exists()


def test_a_kernel_of_todays_rule_that_is_wrong(here, capsys: pytest.CaptureFixture[str]) -> None:
    here(Clock(fails={"b": "wrong numbers: relative error 0.5, expected at most 0.01"}))
    assert main(["tune"]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mxfp4-sm120 tune:")]
    assert "b of today's rule fails, 4 tokens of 20b: wrong numbers" in line and "nothing was written" in line
    assert not tuning.user_path(CARD).exists()


@pytest.mark.parametrize(
    ("card", "installed", "line"),
    [
        ("cpu", {}, "there is no NVIDIA GPU here, and nothing else to tune: run it on the machine that serves"),
        ("RTX 5090", {"library": None}, f"nothing can be tuned: {NOT_BUILT}"),
        ("RTX 5090", {"library": "stub"}, "nothing can be tuned: the CUDA library is a stub: run mxfp4-sm120 build"),
        ("T4", {}, "nothing can be tuned: T4 (sm_75) has no BF16 tensor cores: a card of sm_80 or newer is needed"),
    ],
)
def test_nothing_to_tune(card, installed, line, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    install(monkeypatch, **installed)
    monkeypatch.setattr(Machine, "here", lambda first_gpu: machine(card))
    assert main(["tune"]) == 1
    assert capsys.readouterr().err == f"mxfp4-sm120 tune: {line}\n"


def test_a_folder_that_cannot_be_written(here, home: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It's said before anything is timed."""
    clock = here(Clock())
    for place, why in (("/proc/config", "No such file or directory"), (__file__, "Not a directory")):
        monkeypatch.setenv("XDG_CONFIG_HOME", place)
        assert main(["tune"]) == 1 and clock.asked == []
        [line] = capsys.readouterr().err.splitlines()
        assert why in line and line.endswith("): set XDG_CONFIG_HOME, or give --dry-run")
    monkeypatch.setattr(tuning, "user_folder", lambda *_: None)
    assert main(["tune"]) == 1 and "this user has no home directory to keep a rule in" in capsys.readouterr().err


# What a GPU is asked.


def test_kernels_within_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    table = [
        library.Configuration("decode", 8192, 7168, 300_000, 1, 1),
        library.Configuration("gathered", 64, 7168, 2**31 - 1, 1, 1),
        library.Configuration("tokens24", 8192, 2048, 2**31 - 1, 1, 1),
        *(library.Configuration(bound.kernel, 8192, 7168, 2**31 - 1, 1, 1) for bound in SHIPPED[3:]),
    ]
    monkeypatch.setattr(library, "configurations", lambda: table)
    monkeypatch.setattr(native_tuning, "found", lambda card: tuning.Found(Path("x"), SHIPPED))
    native, tiles = gpu.jobs(CARD, [models.model("20b")])
    assert native.rule == SHIPPED and native.version == library.version()
    assert native.kernels(size(26))[:3] == ["decode", "gathered", "tokens40"]  # 26 x 4 x 2880 values
    assert native.kernels(size(27))[:2] == ["gathered", "tokens40"] and "gathered" not in native.kernels(size(65))
    assert set(tiles.kernels(size(1))) >= {bound.kernel for bound in tiles.rule} and tiles.sizes[-1].tokens == 8192
    assert "16x32x128w2s5" in tiles.kernels(size(1)) and "16x32x128w2s5" not in tiles.kernels(size(8192))


@pytest.mark.usefixtures("one_thread")
def test_only_right_answers_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of a GPU, here on a CPU with the tiny model and `tiled` in the kernels' place."""

    def fixed(family: Family, sizes: models.Model, kernel: str):
        def wrong(prepared, x, logits):
            return Tiled(sizes.experts).forward_logits(prepared, x, logits) * 1.5

        def raises(prepared, x, logits):
            raise RuntimeError("out of resource: shared memory\nand more")

        return {"wrong": wrong, "raises": raises}.get(kernel, Tiled(sizes.experts).forward_logits)

    monkeypatch.setattr(gpu, "Native", Tiled)
    monkeypatch.setattr(gpu, "_fixed", fixed)
    monkeypatch.setattr(timing, "WARM_UPS", 0)
    monkeypatch.setattr(gpu, "ROUNDS", 2)
    monkeypatch.setattr(gpu, "REPLAYS", 1)
    clock = gpu.OnGpu(torch.device("cpu"))
    timed = clock(Family.NATIVE, Size("tiny", 3, 16, 4), ["x", "wrong", "y", "raises"])
    assert list(timed.rounds) == ["x", "y"] and all(len(each) == gpu.ROUNDS for each in timed.rounds.values())
    assert timed.failed["raises"] == "out of resource: shared memory"
    assert timed.failed["wrong"] == "wrong numbers: relative error 0.5, expected at most 0.01"
    assert json.loads(json.dumps(vars(timed))) == vars(timed)

    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setattr(measure, "checked", full)
    monkeypatch.setattr(gpu, "checked", full)
    with pytest.raises(RuntimeError, match=r"tiny, 3 tokens: CUDA out of memory.*; end what else uses"):
        partial(clock, Family.NATIVE, Size("tiny", 3, 16, 4), ["x"])()
