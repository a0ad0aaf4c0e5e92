"""Servers end with the program that started them, however that ends. The server is a stand-in: a port and a child."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH_SERVER = """
import http.server, os, pathlib, subprocess, sys, time

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path != "/health":
            pathlib.Path(os.environ["SEEN"]).write_text(f"{os.getpid()} {child.pid} {port}")
            time.sleep(1000)
        self.send_response(200)
        self.end_headers()

child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
PROGRAM = """
import sys
from pathlib import Path
from sglang_deltastore.host.server_process import serve

with serve("no model", log_path=Path(sys.argv[1])) as server:
    server.store_stats()
"""
DEADLINE_S = 60


def wait_for(what: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + DEADLINE_S
    while not what() and time.monotonic() < deadline:
        time.sleep(0.1)
    return what()


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def end_in_mid_request(folder: Path, command: list[str], signal_number: int) -> tuple[int, str]:
    """Start a program that starts a server, signal it while it waits for an answer; what it exits with and prints.
    Fails where anything of the server is left."""
    (folder / "sglang").mkdir()
    (folder / "sglang" / "__init__.py").write_text("")
    (folder / "sglang" / "launch_server.py").write_text(LAUNCH_SERVER)
    (folder / "tmp").mkdir()
    path = os.pathsep.join([str(folder), str(ROOT), str(ROOT / "kernels")])
    seen = folder / "seen"
    environ = {**os.environ, "PYTHONPATH": path, "SEEN": str(seen), "TMPDIR": str(folder / "tmp")}
    program = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert wait_for(lambda: seen.exists() and len(seen.read_text().split()) == 3), program.communicate()[0]
    *pids, port = map(int, seen.read_text().split())
    program.send_signal(signal_number)
    printed = program.communicate(timeout=DEADLINE_S)[0]
    left = [pid for pid in pids if not wait_for(lambda pid=pid: not running(pid))]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
    assert not listening(port)
    return program.returncode, printed


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_demo_and_all_it_started(tmp_path: Path, signal_number: signal.Signals) -> None:
    demo = [sys.executable, "-m", "sglang_deltastore.cli", "demo", "--model", str(tmp_path)]
    code, printed = end_in_mid_request(tmp_path, demo, signal_number)
    assert code == 128 + signal_number
    assert f"ended by {signal_number.name}" in printed and "Traceback" not in printed
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_killed_program_leaves_no_server(tmp_path: Path) -> None:
    program = [sys.executable, "-c", PROGRAM, str(tmp_path / "log")]
    code, _ = end_in_mid_request(tmp_path, program, signal.SIGKILL)
    assert code == -signal.SIGKILL
