# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` as a child process: started, waited for, asked over HTTP, stopped."""

from __future__ import annotations

import argparse
import errno
import http.client
import json
import os
import random
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from vllm_mxfp4_sm120.lifeline import tied

HOST = "127.0.0.1"
# A server listens there on all addresses; who asks it takes the loopback's.
LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
# Below those that systems deal out to clients, of which one could take a port while its server starts.
SERVERS_PORTS = range(20_000, 32_768)
SECONDS_TO_END = 20.0  # vLLM needs some to end its engine after SIGINT
# The line that quantization/fused_moe.py logs in the process that holds the layers.
ANSWERED_BY = re.compile(r"mxfp4_sm120: (MXFP4 experts on .*)")


@dataclass(frozen=True)
class Address:
    """What the arguments of `vllm serve` say about how it's asked."""

    host: str = HOST
    names: Sequence[str] = ()
    api_key: str | None = field(default=None, repr=False)
    tls: bool = False

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Address:
        """Raises ValueError, in one line, for what `complete` can't follow."""
        parser = _Parser(add_help=False, allow_abbrev=False)
        for option in ("--host", "--uds", "--port", "--config", "--ssl-certfile", "--ssl-cert-reqs"):
            parser.add_argument(option)
        parser.add_argument("--served-model-name", nargs="+", default=[])
        parser.add_argument("--api-key", nargs="*", default=[])
        given = parser.parse_known_args([_dashes(argument) for argument in arguments])[0]
        if given.config:
            in_file = parser.parse_known_args(_config_arguments(Path(given.config)))[0]
            for key, value in vars(in_file).items():
                if getattr(given, key) in (None, []):
                    setattr(given, key, value)
        if given.port:
            raise ValueError(f"--port {given.port} after --: give it before --, so that the check asks there")
        if given.uds:
            raise ValueError(f"--uds {given.uds}: the check asks over TCP only; use vllm serve itself")
        if (given.ssl_cert_reqs or "0") != "0":
            raise ValueError("--ssl-cert-reqs: the check has no certificate of its own; use vllm serve itself")
        keys = [key for key in (*given.api_key, os.environ.get("VLLM_API_KEY")) if key]
        return cls(given.host or HOST, given.served_model_name, keys[0] if keys else None, bool(given.ssl_certfile))

    def url(self, port: int) -> str:
        """Where the server on that port is asked from this machine."""
        host = LOOPBACK.get(self.host, self.host)
        return f"{'https' if self.tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _dashes(argument: str) -> str:
    """vLLM takes --api_key for --api-key."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def _config_arguments(path: Path) -> list[str]:
    """A file for vLLM's --config, as arguments. Raises ValueError if it isn't one, OSError if it can't be read."""
    import yaml  # vLLM brings it

    try:
        given = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, RecursionError):
        raise ValueError(f"--config {path} is not YAML") from None
    if not isinstance(given, dict):
        raise ValueError(f"--config {path} is {type(given).__name__}, expected a mapping of options to values")
    arguments: list[str] = []
    for key, value in given.items():
        values = value if isinstance(value, list) else [value]
        arguments += [_dashes(f"--{key}"), *(str(each) for each in values if not isinstance(each, bool))]
    return arguments


@dataclass
class Server:
    """`vllm serve` in a session of its own; as a context manager it is stopped at the end, workers included.

    stdout and stderr go to `log`. `port` None takes one that is free. Raises ValueError for a port that is taken.
    """

    model: str
    arguments: Sequence[str]
    log: Path
    port: int | None = None
    env: dict[str, str] | None = None

    def __enter__(self) -> Server:
        self.address = Address.parse(self.arguments)
        if self.port is not None:
            check_port(self.address.host, self.port)
        self.port = self.port or free_port(self.address.host)
        self.url = self.address.url(self.port)
        vllm = Path(sys.executable).with_name("vllm")
        if not vllm.exists():
            raise ValueError(f"there is no {vllm}: install vLLM for this Python")
        self.command = [str(vllm), "serve", self.model, "--host", HOST, "--port", str(self.port)]
        self.command += [*self.arguments, *eager_if_nothing_compiles()]
        self._exits = ExitStack()
        log = self._exits.enter_context(self.log.open("w"))
        # By its own interpreter: the first line of a script in a long path is cut off.
        tied_server = tied(
            [sys.executable, *self.command],
            SECONDS_TO_END,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=self.env,
        )
        self.process = self._exits.enter_context(tied_server)
        self.started = time.monotonic()
        return self

    def __exit__(self, *error: Any) -> None:
        self._exits.__exit__(*error)

    def wait_until_healthy(self, timeout: float = 1800) -> float:
        """Seconds from start until /health answers. Raises RuntimeError with the log's end if the server dies."""
        while time.monotonic() - self.started < timeout:
            if self.process.poll() is not None:
                status, why = self.process.returncode, first_error(self.log)
                raise RuntimeError(f"vllm serve ended with exit status {status}: {why}; see {self.log}")
            try:
                if self.listens():  # the port may be another's by now
                    with self._open("/health", timeout=5):
                        return time.monotonic() - self.started
            except (OSError, http.client.HTTPException):
                pass
            time.sleep(0.5)
        raise RuntimeError(f"vllm serve was not healthy within {timeout:.0f} s; see {self.log}")

    def listens(self) -> bool:
        """Is it this server, or a process of it, that listens on the port, and nobody else beside it?

        vLLM sets SO_REUSEPORT: two of them may listen on one port, and the kernel deals out the requests.
        """
        import psutil  # vLLM brings it

        try:
            family = [self.process.pid, *(child.pid for child in psutil.Process(self.process.pid).children(True))]
        except psutil.NoSuchProcess:
            return False
        listeners = [
            found
            for found in psutil.net_connections("tcp")
            if found.status == psutil.CONN_LISTEN and found.laddr.port == self.port
        ]
        ours = {found.laddr.ip for found in listeners if found.pid in family}
        return bool(ours) and all(found.pid in family for found in listeners if found.laddr.ip in ours)

    def complete(self, prompt: str | list[int], max_tokens: int, **options: Any) -> dict[str, Any]:
        """One greedy completion over HTTP, as /v1/completions answers it. Raises RuntimeError with what it refused."""
        # Not chat's: that wants GPT-OSS's own vocabulary of the model, which small ones don't have.
        model = next(iter(self.address.names), self.model)
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **options}
        try:
            with self._open("/v1/completions", json.dumps(body).encode(), timeout=600) as response:
                answer: dict[str, Any] = json.load(response)
                return answer
        except urllib.error.HTTPError as error:
            said = error.read(1000).decode(errors="replace")
            raise RuntimeError(
                f"/v1/completions answered {error.code} {error.reason}: {said}; see {self.log}"
            ) from None

    def _open(self, path: str, data: bytes | None = None, timeout: float = 60) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.address.api_key is not None:
            headers["Authorization"] = f"Bearer {self.address.api_key}"
        request = urllib.request.Request(f"{self.url}{path}", data, headers)
        # It's this machine's, whose processes `listens` knows: no proxy, and no certificate of an authority.
        context = ssl._create_unverified_context()
        handlers = (urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
        return urllib.request.build_opener(*handlers).open(request, timeout=timeout)

    def answered_by(self) -> str | None:
        """What this plugin's layers said of themselves as they were made, None if there were none."""
        found = ANSWERED_BY.search(self.log.read_text(errors="replace"))
        return found and found.group(1)


def first_error(log: Path) -> str:
    """The line of vLLM's log that says what went wrong; later ones only say that something did."""
    text = log.read_text(errors="replace")
    # Errors of configuration come inside pydantic's, those of worker processes behind the logger's prefix.
    found = re.search(r"Value error, (.*?)(?: \[type=|$)", text, re.M) or re.search(
        r"(?:^|\] )((?:\w+\.)*\w+Error: .*)$", text, re.M
    )
    return found.group(1) if found else (text.strip().splitlines() or ["it said nothing"])[-1]


def _bind(host: str, port: int) -> int:
    """A port that nobody listens on. Raises OSError if somebody does, on this address or on all."""
    host = host or "0.0.0.0"
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that ended a moment ago don't count
        probe.bind(address)
        return int(probe.getsockname()[1])


def check_port(host: str, port: int) -> None:
    """Raises ValueError, in one line, if a server can't listen there."""
    try:
        _bind(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"--port {port} is taken: another program listens on it; choose another one") from None
        raise ValueError(f"--port {port} of {host} can't be used: {error.strerror or error}") from None


def free_port(host: str = HOST) -> int:
    """A port that nobody listens on now. Raises OSError if the host is none of this machine's."""
    for port in random.SystemRandom().sample(SERVERS_PORTS, 16):
        with suppress(OSError):
            return _bind(host, port)
    return _bind(host, 0)


def eager_if_nothing_compiles() -> list[str]:
    """On a CPU vLLM compiles its model with the system's C++ compiler; without one it has to run uncompiled."""
    import torch

    if torch.cuda.is_available() or shutil.which("g++") or shutil.which("clang++"):
        return []
    print("no C++ compiler here: serving with --enforce-eager")
    return ["--enforce-eager"]
