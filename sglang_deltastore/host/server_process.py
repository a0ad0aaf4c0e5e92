"""An SGLang server as a child process: started, waited for, and gone afterwards with all its children, even where the
program that started it is killed."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

from ..observe.stats import StoreStats
from . import variables

START_TIMEOUT_S = 600
_STOP_TIMEOUT_S = 20
_ANSWER_TIMEOUT_S = 120
_LOG_TAIL_LINES = 40
_PORTS = range(20_000, 30_000)
#: $1: a process group, $2: seconds it has to end once asked
_WATCH = """
cat >/dev/null
kill -TERM "-$1"
for second in $(seq "$2"); do kill -0 "-$1" || exit 0; sleep 1; done
kill -KILL "-$1"
"""


class ServerFailed(RuntimeError):
    """The server ended, or was not ready in time; the message ends with the last lines of its log."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    log_path: Path
    process: subprocess.Popen[bytes]

    def store_stats(self, replica: int = 0) -> StoreStats:
        """The facts of a replica's store."""
        response = requests.get(self.url + "/deltastore/stats", timeout=_ANSWER_TIMEOUT_S)
        response.raise_for_status()
        return StoreStats.from_dict(response.json()[replica])

    def settled_stats(self, replica: int = 0, timeout_s: float = _ANSWER_TIMEOUT_S) -> StoreStats:
        """The same once nothing runs and every page has been looked at; after the timeout as they are then."""
        deadline = time.monotonic() + timeout_s
        while not (stats := self.store_stats(replica)).census_current and time.monotonic() < deadline:
            time.sleep(0.1)  # the server learns late that a client has hung up
        return stats

    def is_healthy(self) -> bool:
        """Whether the server answers a request that generates a token."""
        return requests.get(self.url + "/health_generate", timeout=_ANSWER_TIMEOUT_S).status_code == 200


@contextmanager
def serve(
    model_path: str | Path,
    arguments: Sequence[str] = (),
    *,
    log_path: Path,
    port: int | None = None,
    environ: Mapping[str, str] | None = None,
    start_timeout_s: float = START_TIMEOUT_S,
) -> Iterator[Server]:
    """Start `python -m sglang.launch_server` with `arguments`, yield it once it is ready, end it.

    `environ` replaces os.environ; what a machine without a GPU needs is added to it. Raises
    ServerFailed when the server does not become ready.
    """
    port = port or free_port()
    environ = dict(os.environ if environ is None else environ)
    environ.update(variables(environ))
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model_path)]
    command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
    with open(log_path, "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environ, start_new_session=True)
    server = Server(f"http://127.0.0.1:{port}", log_path, process)
    with ended_with_us(process):
        try:
            _wait_until_ready(server, start_timeout_s)
            yield server
        finally:
            stop(process)


@contextmanager
def ended_with_us(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """While inside, a shell waits for this program's end and then ends the process group of `process`: a program that
    is killed cannot do so itself. The kernel tells the shell by closing its pipe."""
    watcher = subprocess.Popen(
        ["sh", "-c", _WATCH, "sh", str(process.pid), str(_STOP_TIMEOUT_S)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,  # who reads this program's output must not wait for the shell
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # what ends this program's group must not end the shell
    )
    try:
        yield
    finally:
        watcher.kill()
        watcher.communicate()


def free_port() -> int:
    """A TCP port that nobody listens on now.

    A server binds it half a minute later. Until then nobody else gets it by asking the system for any port, as process
    groups do: Linux deals out higher ones.
    """
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and everything it started: ask first, kill what does not go."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    process.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(family, timeout=_STOP_TIMEOUT_S)
    for survivor in left:
        survivor.kill()
    psutil.wait_procs(left, timeout=_STOP_TIMEOUT_S)
    process.wait(timeout=_STOP_TIMEOUT_S)


def log_tail(log_path: Path, lines: int = _LOG_TAIL_LINES) -> str:
    return "\n".join(log_path.read_text(errors="replace").splitlines()[-lines:])


def _wait_until_ready(server: Server, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        exit_code = server.process.poll()
        if exit_code is not None:
            raise ServerFailed(f"the server ended with exit code {exit_code}:\n{log_tail(server.log_path)}")
        try:
            if requests.get(server.url + "/health", timeout=10).status_code == 200:
                return
        except requests.RequestException:
            pass  # not listening yet: that is what we wait for
        time.sleep(0.5)
    raise ServerFailed(f"the server was not ready after {timeout_s:.0f} s:\n{log_tail(server.log_path)}")
