# SPDX-License-Identifier: Apache-2.0
"""`mxfp4-sm120 serve` against a stub of vllm: what it asks, whom, and that it leaves nothing behind."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.processes import processes, wait_until
from vllm_mxfp4_sm120.cli import serve
from vllm_mxfp4_sm120.cli.__main__ import main
from vllm_mxfp4_sm120.cli.server import Address, free_port

ROOT = Path(__file__).parents[2]
STUB = Path(__file__).with_name("vllm_stub.py")
PYTHON = sys.executable
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def stub(tmp_path, monkeypatch):
    """A Python beside which lies the stub; the folder for logs is `tmp_path`/logs."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "logs").mkdir()
    python = tmp_path / "bin" / "python"
    python.symlink_to(sys.executable)
    shutil.copy(STUB, tmp_path / "bin" / "vllm")
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "logs"))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody there
    handlers = [signal.getsignal(number) for number in SIGNALS]
    yield python
    for number, handler in zip(SIGNALS, handlers, strict=True):
        signal.signal(number, handler)


def logs(tmp_path):
    return list((tmp_path / "logs").glob("*/server.log"))


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--served-model-name", "x", "y"],
        ["--served_model_name=x"],
        ["--json"],
        ["--api-key", "secret"],
        ["--api-key=secret", "--served-model-name", "x"],
        ["--host", "0.0.0.0", "--root-path", "/prefix"],
        ["--host", "::"],
        ["--host=::1"],
    ],
)
def test_one_completion(extra, tmp_path, capsys):
    if any("::" in argument for argument in extra) and not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6 here")
    assert main(["serve", "model", "--once", "--", *extra]) == 0
    printed = capsys.readouterr()
    assert "completion:  'stub'" in printed.out and "MXFP4 experts on a stub" in printed.out
    assert "secret" not in printed.out + printed.err and "null" not in printed.out
    assert not list((tmp_path / "logs").iterdir())


def test_the_key_of_the_environment_and_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert main(["serve", "model", "--once"]) == 0
    file = tmp_path / "serve.yaml"
    file.write_text("host: 0.0.0.0\napi_key: from-file\nserved-model-name: [a, b]\nenforce-eager: true\n")
    assert Address.parse(["--config", str(file)]) == Address("0.0.0.0", ["a", "b"], "from-file")
    assert Address.parse(["--config", str(file), "--host", "::1"]).url(5) == "http://[::1]:5"
    for text in ("- a list", "a: [", "\x00"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"^--config "):
            Address.parse(["--config", str(file)])


def test_tls(tmp_path):
    key, certificate = str(tmp_path / "key"), str(tmp_path / "certificate")
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here")
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=elsewhere"]
    subprocess.run([*request, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    assert main(["serve", "model", "--once", "--", "--ssl-certfile", certificate, "--ssl-keyfile", key]) == 0


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--uds", "/run/x"], "--uds /run/x: the check asks over TCP only"),
        (["--port", "8000"], "--port 8000 after --"),
        (["--ssl-cert-reqs", "2"], "--ssl-cert-reqs: "),
        (["--served-model-name"], "argument --served-model-name: expected at least one argument"),
        (["--config", "/no/file"], "No such file"),
    ],
)
def test_what_the_check_cannot_do_is_said_before_anything_starts(extra, words, tmp_path, capsys):
    assert main(["serve", "model", "--once", "--", *extra]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and not list((tmp_path / "logs").iterdir())


@pytest.mark.parametrize("text", ["0", "70000", "65536", "-1", "8000.5", "http", "", "٨٠٠٠", "9" * 400])
def test_not_a_port(text, capsys, tmp_path):
    assert main(["serve", "model", f"--port={text}"]) == 2
    assert "is not a port: expected 1 to 65535" in capsys.readouterr().err
    assert not list((tmp_path / "logs").iterdir())


@pytest.mark.parametrize("text", ["0", "-3", "x", "9" * 40])
def test_not_a_number_of_tokens(text, capsys):
    assert main(["serve", "model", f"--max-tokens={text}"]) == 2
    assert "is not a positive number" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_port_that_is_taken(host, shared, tmp_path, capsys):
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as other:
        if shared:  # as vLLM's own servers listen
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            other.bind((host, 0))
        except OSError:
            pytest.skip("no IPv6 here")
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", "model", "--once", "--port", str(port)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--port {port} is taken" in line and not list((tmp_path / "logs").iterdir())


def test_another_servers_health_is_not_ours(tmp_path, monkeypatch):
    """The port is taken between the look at it and the start: what answers there isn't the server that was started."""
    log = tmp_path / "log"
    port = free_port()
    with serve.Server("model", [], log, port) as one:
        one.wait_until_healthy(60)
        monkeypatch.setattr("vllm_mxfp4_sm120.cli.server.check_port", lambda host, port: None)
        with serve.Server("model", [], tmp_path / "other", port) as other, pytest.raises(RuntimeError, match="in use"):
            other.wait_until_healthy(60)


def test_a_server_that_dies(tmp_path, capsys):
    assert main(["serve", "model", "--once", "--", "--dies"]) == 1
    err = capsys.readouterr().err
    (log,) = logs(tmp_path)
    assert "it dies" in err and f"the server's log is kept: {log}" in err


def test_a_refused_completion_keeps_the_log(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Address, "parse", classmethod(lambda cls, arguments: cls()))
    assert main(["serve", "model", "--once", "--", "--served-model-name", "x"]) == 1
    assert "/v1/completions answered 404 Not Found" in capsys.readouterr().err and len(logs(tmp_path)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGKILL])
def test_the_server_ends_with_the_command(number, stub, tmp_path):
    code = (
        f"import sys, tempfile; tempfile.tempdir = {str(tmp_path / 'logs')!r};"
        "from vllm_mxfp4_sm120.cli.__main__ import main; from vllm_mxfp4_sm120.cli import server;"
        f"server.eager_if_nothing_compiles = list; sys.executable = {str(stub)!r};"
        "sys.argv[1:] = ['serve', 'model']; sys.exit(main())"
    )
    mark = f"MARK_OF_SERVE={os.getpid()}-{number}"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "MARK_OF_SERVE": mark.split("=")[1]}
    command = [PYTHON, "-c", code]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if line.startswith("serving"):
                break
        assert len(processes(mark)) >= 4  # command, server, its worker, the one that watches
        process.send_signal(number)
        assert process.wait(60) == (-number if number == signal.SIGKILL else 128 + number)
        wait_until(lambda: not processes(mark))
        assert bool(logs(tmp_path)) == (number == signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(("ignored", "sent"), [(False, "SIGINT"), (True, "SIGTERM")])
def test_the_server_is_ended_by_a_signal_that_it_hears(ignored, sent, tmp_path):
    """Who is started with SIGINT ignored, as behind & in a script, starts its children so."""
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    with serve.Server("model", [], tmp_path / "log") as server:
        server.wait_until_healthy(60)
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        ignores = int(status.partition("SigIgn:")[2].split()[0], 16) >> (signal.SIGINT - 1) & 1
    assert ignores == ignored and f"ended cleanly by {sent}" in (tmp_path / "log").read_text()


def test_nobody_reads_what_it_prints(tmp_path, monkeypatch):
    """As with `| head -1`: the server ends with the command."""
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writing, "w"))
    mark = f"MARK_OF_PIPE={os.getpid()}"
    monkeypatch.setenv(*mark.split("="))
    assert main(["serve", "model"]) == 141
    wait_until(lambda: not processes(mark))


OPTIONS = ["--host", "--uds", "--port", "--api-key", "--served-model-name", "--ssl-certfile", "-h", "--", "-x"]


@settings(max_examples=300)
@given(st.lists(st.sampled_from(OPTIONS) | st.text(max_size=8), max_size=8))
def test_any_arguments_are_an_address_or_one_line(arguments):
    try:
        address = Address.parse(arguments)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert address.url(8000).startswith("http")


def test_keys_are_not_shown():
    command = ["vllm", "--api-key", "a", "b", "--port", "5", "--api_key=c", "-q", "x"]
    assert serve.without_keys(command) == ["vllm", "--api-key", "***", "***", "--port", "5", "--api-key=***", "-q", "x"]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_serve_serves_the_small_model():
    """What it would run names files that are there."""
    env = {"PATH": os.environ["PATH"]}  # nothing of a make that runs the tests
    done = subprocess.run(["make", "-n", "serve"], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    *_, command = done.stdout.strip().splitlines()
    _, _, model, _, option, config = command.split()
    assert (ROOT / model / "config.json").exists() and option == "--config"
    assert "quantization: mxfp4_sm120\n" in (ROOT / config).read_text()
