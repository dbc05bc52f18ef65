# SPDX-License-Identifier: Apache-2.0
"""What holds of every command: examples, JSON alone on stdout, one line for what goes wrong, nothing half-written."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest
from safetensors import SafetensorError

from tests.support.checkpoints import write_small
from vllm_mxfp4_sm120 import __version__, packing
from vllm_mxfp4_sm120.bench import limits
from vllm_mxfp4_sm120.checkpoint import write
from vllm_mxfp4_sm120.cli import bench, build, doctor, ending, inspect, make_tiny, serve, tune
from vllm_mxfp4_sm120.cli.__main__ import COMMANDS, main, parsed
from vllm_mxfp4_sm120.cli.ending import Outcome
from vllm_mxfp4_sm120.cli.progress import progress
from vllm_mxfp4_sm120.drafts import alone

pytestmark = pytest.mark.usefixtures("one_thread", "home")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A packed model and a BF16 one, to be read only."""
    root = tmp_path_factory.mktemp("models")
    write_small(root / "packed")
    packing.unpack(root / "packed", root / "bf16")
    return {name: str(root / name) for name in ("packed", "bf16")}


@pytest.fixture
def folders(models: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Those, and a name for another."""
    (tmp_path / "out").mkdir()
    return models | {"out/new": str(tmp_path / "out" / "new")}


def run(line: str, folders: dict[str, str]) -> int:
    return main([folders.get(word, word) for word in line.split()])


def one_error(said: str, command: str) -> str:
    """The only line on stderr that isn't progress."""
    [line] = [line for line in said.splitlines() if not line.startswith(("packing", "unpacking", "writing"))]
    assert line.startswith(f"mxfp4-sm120 {command}: "), line
    return line.partition(": ")[2]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("columns", ["40", "120"])
def test_help_has_an_example(command: str, columns: str, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert not ended.value.code and f"\n  mxfp4-sm120 {command}" in capsys.readouterr().out


# Command lines with a report, and the status that they have on a machine without a GPU.
REPORTS = {
    "doctor --no-proof": 0,
    "inspect packed": 0,
    "inspect out/new": 1,
    "inspect packed --verify": 1,
    "bench --layers o --tokens 1 --backends torch-bf16": 0,
    "bench --layers o --tokens 1 --backends vllm-marlin-int8": 1,
    "bench --tokens x": 2,
    "tune": 1,
    "pack bf16 out/new": 0,
    "pack bf16 packed": 1,
    "unpack packed out/new": 0,
    "unpack bf16 out/new": 1,
}


@pytest.mark.parametrize("line", REPORTS)
def test_json_is_alone_on_stdout(line: str, folders, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever libraries print; also where the command fails."""
    monkeypatch.setattr(limits, "measured", lambda device: limits.Rates(1e4, 1e5))
    module = sys.modules[f"vllm_mxfp4_sm120.cli.{line.split()[0]}"]
    command = module.run

    def noisy(args) -> Outcome:
        print("a library's greeting")
        return command(args)

    monkeypatch.setattr(module, "run", noisy)
    assert run(f"{line} --json", folders) == REPORTS[line]
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert "a library's greeting" in said.err
    if "error" in report:
        assert f"mxfp4-sm120 {line.split()[0]}: {report['error']}\n" in said.err


STOPS: dict[str, tuple[object, str]] = {
    "doctor": (doctor, "examine"),
    "inspect packed": (inspect, "examine"),
    "bench": (bench, "examine"),
    "tune": (tune, "bench"),
    "pack bf16 out/new": (packing.pack.__globals__["files"], "copy_rest"),
    "unpack packed out/new": (packing.pack.__globals__["files"], "copy_rest"),
    "make-tiny out/new": (make_tiny, "output_layer"),
    "build --all": (build, "places"),
    "serve packed": (serve, "Server"),
}
SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


@pytest.fixture
def unwinding() -> Iterator[None]:
    """As a program has it, whose arguments are the process's."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    ending.unwind_on_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("unwinding")
@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("line", STOPS)
def test_a_signal(line: str, name: str, folders, tmp_path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    """130 after Ctrl-C, and nothing half-written under the name that was asked for; a draft that the next run takes."""
    module, function = STOPS[line]
    monkeypatch.setattr(module, function, lambda *_, **__: signal.raise_signal(signal.Signals[name]))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status: int | str | None
    try:
        status = run(line, folders)
    except SystemExit as ended:
        status = ended.code
    assert status == SIGNALS[name]
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert left == (["new.partial"] if "pack " in line else [])
    assert not list(tmp_path.glob("mxfp4-sm120-*"))
    if name == "SIGINT":
        said = capsys.readouterr().err
        assert one_error(said, line.split()[0]).startswith("stopped")
        monkeypatch.undo()
        assert "pack " not in line or run(line, folders) == 0


@pytest.mark.parametrize("line", ["make-tiny out/new", "pack bf16 out/new", "unpack packed out/new"])
def test_a_full_disk(line: str, folders, tmp_path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As safetensors says it. One line names the folder."""

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(write, "save_file", full)
    assert run(line, folders) == 1
    assert one_error(capsys.readouterr().err, line.split()[0]) == f"{folders['out/new']}: No space left on device"
    assert not Path(folders["out/new"]).exists()


def closed_pipe() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("options", ["", " --json"])
@pytest.mark.parametrize(
    ("opened", "status", "line"),
    [
        (closed_pipe, 141, None),
        (lambda: os.open("/dev/full", os.O_WRONLY), 1, "the report can't be printed: No space left on device"),
        (None, 0, None),
    ],
    ids=["a closed pipe", "a full disk", "closed"],
)
def test_stdout(
    opened: Callable[[], int] | None, status: int, line: str | None, options: str, folders, monkeypatch, capsys
) -> None:
    """As `| head` leaves it, and where it can't be written: no traceback, nor Python's complaint at its end."""
    stdout = None if opened is None else os.fdopen(opened(), "w")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run(f"inspect packed{options}", folders) == status
    if stdout is not None:
        stdout.close()  # raises where something is left that can't be written
    said = capsys.readouterr().err
    assert said == "" if line is None else one_error(said, "inspect") == line


def test_stderr_that_nobody_reads(folders, monkeypatch) -> None:
    for stream, status in ((None, 0), (os.fdopen(closed_pipe(), "w"), 141)):
        monkeypatch.setattr(sys, "stderr", stream)
        with suppress(FileNotFoundError):
            os.rename(folders["out/new"], folders["out/new"] + "-1")
        assert run("pack bf16 out/new", folders) == status


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
@pytest.mark.parametrize(("unit", "amount"), [("GB", "2.0/4.0 GB"), ("sizes", "20/40")])
def test_progress(stream: type[io.StringIO], unit: str, amount: str, monkeypatch) -> None:
    """A bar on a terminal, however narrow; elsewhere a line now and then; nothing where JSON is asked for."""
    said = stream()
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", said)
    done = 2_000_000_000 if unit == "GB" else 20
    with progress("measuring", unit=unit) as show:
        show("layer 1", done, 2 * done)
        show("layer 2", done, 2 * done)
    text = said.getvalue()
    assert ("\x1b" in text) == (stream is Terminal)
    if stream is Terminal:
        assert "measuring layer 2" in text and amount in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    else:
        amount = "2.00 of 4.00 GB" if unit == "GB" else "20 of 40 sizes"
        assert text == f"measuring layer 1: {amount}\n"  # the second comes too soon
    with progress("measuring", quiet=True) as show:
        show("layer 3", 1, 2)
    assert "layer 3" not in said.getvalue()


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch) -> None:
    def no_locks(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with alone(tmp_path), pytest.raises(BlockingIOError, match="another process is writing it"), alone(tmp_path):
        pass
    monkeypatch.setattr("fcntl.flock", no_locks)
    with alone(tmp_path), alone(tmp_path):
        pass


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("No module named 'x'", name="x"), "Python's module x is missing here: install vLLM"),
        (FileNotFoundError(2, "No such file or directory", "a b"), "a b: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("in words"), "in words"),
        (MemoryError(), "not enough memory"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_errors_in_words(error: BaseException, words: str) -> None:
    assert ending.in_words(error).startswith(words)


def test_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    for argument, words in (
        ("--version", f"mxfp4-sm120 {__version__}\n"),
        ("--help", "mxfp4-sm120 COMMAND --help has examples."),
    ):
        with pytest.raises(SystemExit) as ended:
            main([argument])
        assert not ended.value.code and words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "mxfp4-sm120: the following arguments are required: COMMAND; see mxfp4-sm120 --help"),
        ("docter", "mxfp4-sm120 docter: argument COMMAND: invalid choice: 'docter' (choose from"),
        ("pack t", "mxfp4-sm120 pack: the following arguments are required: DST; see mxfp4-sm120 pack --help"),
        # A script relies on what is said: were `--js` taken for --json, a new option could change it.
        ("doctor --js", "mxfp4-sm120 doctor: unrecognized arguments: --js; see mxfp4-sm120 doctor --help"),
        ("pack bf16 out/new --shard-gb nan", "mxfp4-sm120 pack: --shard-gb is nan, expected more than 0"),
        ("pack bf16 out/new --device tpu", "mxfp4-sm120 pack: --device tpu: expected cpu, or cuda for a GPU"),
        ("pack bf16 out/new --calibrate x", "mxfp4-sm120 pack: --calibrate weighs the errors that --search compares"),
        ("inspect no/model --verify", "mxfp4-sm120 inspect: --verify reads the files of a folder, and no/model is"),
        ("make-tiny out/new --layers 3", "mxfp4-sm120 make-tiny: --layers is 3, expected 1 to 2"),
        ("tune --model 7b --json", "mxfp4-sm120 tune: argument --model: invalid choice: '7b'"),
    ],
)
def test_wrong_arguments(line: str, words: str, folders, capsys: pytest.CaptureFixture[str]) -> None:
    """One line and 2, whoever finds it; as JSON, too, where that was asked for."""
    assert run(line, folders) == 2
    said = capsys.readouterr()
    assert said.err.startswith(words) and len(said.err.splitlines()) == 1
    assert (json.loads(said.out) if "--json" in line else {"error": words}).keys() == {"error"}
    assert not list(Path(folders["out/new"]).parent.iterdir())


def test_arguments_that_are_right() -> None:
    module, args = parsed(["inspect", "m", "--json"])
    assert isinstance(module, ModuleType) and args.json
