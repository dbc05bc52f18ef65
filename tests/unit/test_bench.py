# SPDX-License-Identifier: Apache-2.0
"""bench: what is timed is right, what fails is one line, what is drawn is what was measured."""

from __future__ import annotations

import json
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from tests.docs.pages import ROOT
from vllm_mxfp4_sm120.bench import dense, experts, limits, measure, models, plot
from vllm_mxfp4_sm120.bench.limits import Rates
from vllm_mxfp4_sm120.bench.table import Table, from_data
from vllm_mxfp4_sm120.cli import bench
from vllm_mxfp4_sm120.cli.__main__ import main
from vllm_mxfp4_sm120.drafts import draft_of
from vllm_mxfp4_sm120.platform import Machine
from vllm_mxfp4_sm120.proof import timing

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="made for CPUs: tests/gpu has this for a GPU"),
]
CPU = torch.device("cpu")
RATES = Rates(read=1e4, multiply=1e5)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MXFP4_SM120_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(limits, "measured", lambda device: RATES)
    monkeypatch.setattr(measure, "REPEATS", {"cpu": 1})
    monkeypatch.setattr(timing, "WARM_UPS", 0)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict]:
    status = main(["bench", "--json", *map(str, arguments)])
    return status, json.loads(capsys.readouterr().out)


def test_a_cpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every path of a CPU, checked and timed, drawn with the same numbers; and what needs a GPU is named."""
    names = "tiled,upcast,reference,native,vllm-marlin,torch"
    picture = tmp_path / "here.svg"
    status, report = run(capsys, "--layers", "experts,o", "--tokens", "5,1", "--backends", names, "--plot", picture)
    assert status == 0 and report["sm"] == "cpu" and report["versions"]["torch"] == torch.__version__
    layer, o = report["tables"]
    assert layer["columns"] == ["tokens", "limit", "tiled", "upcast", "reference"]
    assert o["columns"] == ["tokens", "limit", "limit int8", "torch-bf16", "torch-int8"]
    assert layer["left_out"] == {
        "native": layer["left_out"]["native"],
        "vllm-marlin": "vLLM's kernels need an NVIDIA GPU",
    }
    assert "NVIDIA GPU" in layer["left_out"]["native"] and o["left_out"]["vllm-marlin-int8"] == "it needs an NVIDIA GPU"
    for table in (layer, o):
        assert [row[0] for row in table["rows"]] == [1, 5] and all(cell > 0 for row in table["rows"] for cell in row)
        assert set(table["errors"]) == set(table["compared"]) and all(0 < e < 1e-2 for e in table["errors"].values())
        assert table["command"] == f"mxfp4-sm120 bench --layers experts,o --backends {names} --tokens 5,1"
    drawn = ElementTree.parse(picture).find(".//{http://purl.org/dc/elements/1.1/}description")
    assert json.loads(drawn.text) == [layer["rows"], o["rows"]]
    assert picture.read_text().count("fraction of the limit") == 2  # as a comment, the letters are curves


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--layers", "experts", "--tokens", "2", "--backends", "upcast,vllm-triton", "--skew"]) == 0
    said = capsys.readouterr()
    lines = [line.split() for line in said.out.splitlines()]
    assert ["tokens", "limit", "upcast"] in lines and any(line[:1] == ["error"] for line in lines)
    assert "these are the CPU's paths" in said.out and "vllm-triton: vLLM's kernels need an NVIDIA GPU" in said.out
    assert "measuring experts: 1 of 1 sizes" in said.err


def failing(how: str) -> experts.Make:
    def make(shape, weights):
        if how == "not installed":
            import no_such_module_as_this  # noqa: F401
        if how == "no memory":
            raise torch.OutOfMemoryError("out of memory. Tried to allocate\nand a lot of advice")
        right = experts.in_float32(shape, weights)

        def layer(x, logits):
            out = right(x, logits)
            if how == "one wrong row":
                out[-1] *= 1.5
            elif how == "one value not written":
                out[0, 0] = torch.nan
            elif how == "refuses two tokens" and len(x) == 2:
                raise ValueError("two tokens?\nno")
            return out

        return layer

    return make


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("not installed", "not importable here: No module named 'no_such_module_as_this'"),
        ("no memory", "out of memory. Tried to allocate"),
        ("one wrong row", "1 tokens: wrong numbers: relative error 0.5, expected at most 0.01"),
        ("one value not written", "1 tokens: wrong numbers: relative error nan, expected at most 0.01"),
        ("refuses two tokens", "2 tokens: two tokens?"),
    ],
)
def test_a_candidate_that_fails_is_one_line(
    how: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    makers = {"native": (failing(how), False), "upcast": experts.maker("upcast", Machine.here())}
    monkeypatch.setattr(experts, "maker", lambda name, machine: makers[name])
    arguments = ("--layers", "experts", "--tokens", "1,2", "--backends", "native,upcast")
    status, report = run(capsys, *arguments)
    [table] = report["tables"]
    assert status == 0 and table["left_out"] == {"native": line}
    assert all(row[-1] > 0 for row in table["rows"])  # upcast was timed all the same
    if how == "refuses two tokens":
        assert table["rows"][0][2] > 0 and table["rows"][1][2] is None
    assert main(["bench", *arguments]) == 0
    assert f"native: {line}" in capsys.readouterr().out


def test_nothing_that_can_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--layers", "experts", "--tokens", "1", "--backends", "vllm-marlin")[0] == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--layers", "qkw"], "--layers has 'qkw', expected some of experts, qkv, o, lm_head"),
        (["--backends", "marlin"], "--backends has 'marlin', expected some of flashinfer_trtllm"),
        (["--tokens", "0"], "--tokens is '0', expected numbers from 1 to 65536, such as 1,8,64"),
        (["--tokens", "1,x"], "--tokens is '1,x', expected numbers"),
        (
            ["--tp", "7"],
            "--tp 7: expected ranks that share gpt-oss-tiny's 5 blocks of 32 of the intermediate size",
        ),
        (["--tp", "x"], "argument --tp: invalid int value: 'x'; see mxfp4-sm120 bench --help"),
        (["--plot", "x.pdf"], "--plot x.pdf: expected a file that ends in .png or .svg"),
        (["--plot", "/proc/x.png"], "--plot /proc/x.png: no file can be made there ("),
        (["--plot", "no/such/folder/x.png"], "--plot no/such/folder/x.png: its folder doesn't exist"),
    ],
)
def test_wrong_arguments(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"mxfp4-sm120 bench: {line}") and len(said.splitlines()) == 1


def test_what_was_measured_is_printed_though_it_cannot_be_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plot, "draft_of", full)
    arguments = ["bench", "--layers", "o", "--tokens", "1", "--json", "--plot", str(tmp_path / "x.png")]
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["tables"][0]["rows"] and said.err.endswith("x.png: No space left on device\n")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It's said before anything is measured."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert plot.why_not(tmp_path / "x.png") == "--plot needs matplotlib: pip install matplotlib"


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(timing, "medians", interrupted)
    assert main(["bench", "--layers", "o", "--tokens", "1", "--plot", str(tmp_path / "x.png")]) == 130
    said = capsys.readouterr()
    assert said.out == "" and said.err.endswith("mxfp4-sm120 bench: stopped\n")
    assert not list(tmp_path.glob("*.png"))


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), draft_of(path) as draft:
        draft.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with draft_of(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_candidates_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM_UPS", 2)
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = timing.interleaved(calls, CPU, 3)
    assert order == ["a", "b"] * 5 and [len(each) for each in times.values()] == [3, 3]
    assert timing.medians({"sleep": lambda: time.sleep(0.01)}, CPU, 3)["sleep"] > 9_000


def test_what_a_walk_leaves_unwritten_is_noticed() -> None:
    """A kernel that writes half of its output, into memory where the right answer of an earlier call still lies."""
    right = torch.randn(4, 8)
    kept = right.clone()
    lazy = timing.Walk(lambda: kept[:2].copy_(right[:2]), 1, [kept])
    judge = models.Judge(torch.tensor([0, 1]), right[:2].double())
    with pytest.raises(measure.Wrong, match="relative error nan"):
        measure.checked(lazy, judge, 1e-2)


def test_of_several_kernels_the_fastest_is_timed() -> None:
    def way(seconds: float, answer: float) -> list:
        return [lambda: (time.sleep(seconds), torch.tensor([answer]))[1]] * 2

    [call, _] = measure.fastest([way(0.01, 1.0), way(0.0, 2.0), way(0.02, 3.0)], CPU, capture=False)
    assert call() == 2.0


def test_the_limit() -> None:
    """By hand, for gpt-oss-20b: an expert's bytes, and 2 x 3 x H x I operations for each of a token's 4 experts."""
    shape = models.model("20b").experts
    few, many = RATES.experts(shape, 1, 4), RATES.experts(shape, 4096, 32)
    assert few == pytest.approx(4 * 3 * 2880 * 2880 * 17 / 32 / 1e4)
    assert many == pytest.approx(4096 * 4 * 6 * 2880 * 2880 / 1e5)


def test_the_linear_layers_are_gpt_oss() -> None:
    assert models.model("20b").dense == {"qkv": (5120, 2880), "o": (2880, 4096), "lm_head": (201088, 2880)}
    assert models.model("20b", 2).dense == {"qkv": (2560, 2880), "o": (2880, 2048), "lm_head": (100544, 2880)}
    assert models.model("tiny").dense["lm_head"] == (320, 192)  # of 304 tokens, padded as vLLM pads them
    assert [models.dense_copies(*each) for each in models.model("20b").dense.values()] == [24, 24, 2]


def test_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(limits, "BUFFER_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(limits, "MATRIX", {"cpu": 64})
    rates = limits.measured(CPU)
    assert 1e2 < rates.read < 1e7 and 10 < rates.multiply < 1e8  # 0.1 GB/s to 10 TB/s, 10 MFLOP/s to 100 TFLOP/s


def test_half_of_the_choices_are_skewed() -> None:
    shape = models.model("tiny").experts
    inputs = models.Inputs.random(shape, 9, 1, CPU, skew=True)
    assert {0, 1} <= set(inputs.logits[0].topk(shape.top_k).indices[3].tolist())
    assert 2 < inputs.active_experts(shape.top_k) <= shape.num_experts


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "data").glob("layer-*.json")), ids=lambda path: path.stem)
def test_docs_data_are_tables(path: Path) -> None:
    table = from_data(json.loads(path.read_text()))
    assert table.compared and all(list(table.pairs(name)) for name in table.compared)


def test_fractions_of_the_limit() -> None:
    table = Table("", "", "", ["tokens", "limit", "limit int8", "a", "b"], ["a", "b"], {"a": "limit int8"})
    table.add(1, {"limit": 10.0, "limit int8": 5.0, "a": 10.0, "b": 20.0})
    table.add(2, {"limit": 10.0, "limit int8": 5.0, "a": 1234.56})
    assert table.rows == [[1, 10.0, 5.0, 10.0, 20.0], [2, 10.0, 5.0, 1234.6, None]]
    assert table.fractions("a") == [(1, 0.5), (2, 5.0 / 1234.6)] and table.fractions("b") == [(1, 0.5)]


def test_who_is_timed_on_which_card() -> None:
    blackwell = Machine((12, 0), (13, 0), "RTX 5090")
    assert experts.names(blackwell) == ("flashinfer_trtllm", "native", "triton", "vllm-marlin", "vllm-triton")
    assert "native-int8" in dense.names(blackwell) and "torch-int8" not in dense.names(blackwell)
    assert measure.chosen(["native"], (), dense.ALL) == ["native-bf16", "native-int8"]
    assert bench.chosen_backends("vllm,vllm-marlin,native") == ["vllm", "vllm-marlin", "native"]
