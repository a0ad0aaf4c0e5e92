"""The tutorial's commands, typed one after the other with a cache that knows no calibration; what they print is what it
shows."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from importlib.metadata import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

from sglang_deltastore.cache_folder import cache_folder
from sglang_deltastore.host.server_process import ended_with_us, free_port, log_tail, stop
from tests.test_readme import FENCE, text_of

PORT = "30000"
"""The tutorial's, and where `deltastore top` looks."""
TIMEOUT_S = 600
"""For a server's start, and for what one says only after a while."""


class Step(NamedTuple):
    """Commands, and lines that they print."""

    commands: str
    shown: tuple[str, ...]


def steps_of(text: str) -> list[Step]:
    found: list[Step] = []
    for _, language, content in (fence.group(0, 1, 2) for fence in FENCE.finditer(text)):
        if not language:
            found.append(Step(content, ()))
        elif language == "text":
            found[-1] = found[-1]._replace(shown=tuple(content.splitlines()))
    return found


def missing(shown: tuple[str, ...], printed: str) -> str | None:
    """The first line that none is like, from the one on that was like the line before: tables stand side by side.
    Spaces do not count, and `...` is like anything."""
    lines = ["".join(line.split()) for line in printed.splitlines()]
    for line in shown:
        pattern = re.compile(".*".join(re.escape("".join(part.split())) for part in line.split("...")))
        like = [at for at, each in enumerate(lines) if pattern.fullmatch(each)]
        if not like:
            return line
        lines = lines[like[0] :]
    return None


class Terminals:
    """One for commands, one for a server."""

    def __init__(self, folder: Path, models: Path) -> None:
        """models: as they lie in the user's cache, so that none is downloaded."""
        (folder / "cache/deltastore").mkdir(parents=True)
        (folder / "cache/deltastore/models").symlink_to(models)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environ = {**os.environ, "PATH": path, "XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "160"}
        self.folder, self.log = folder, folder / "server.log"
        self.url = f"http://127.0.0.1:{free_port()}"
        self.server = ExitStack()

    def follow(self, step: Step) -> None:
        if "pip install" in step.commands:
            check_extras(step.commands)
        elif "sglang.launch_server" in step.commands:
            self.serve(step)
        elif step.commands.startswith("deltastore top"):  # of a server that is not done yet
            until_shown(step, lambda: self.output(step))
        else:
            printed = self.output(step)
            assert not (line := missing(step.shown, printed)), f"{line!r} is not in:\n{printed}"

    def shell(self, step: Step) -> list[str]:
        """On a port that is free."""
        typed = step.commands.replace("deltastore top", f"deltastore top --url {self.url}")
        return ["bash", "-ec", typed.replace(PORT, self.url.rpartition(":")[2])]

    def output(self, step: Step) -> str:
        done = subprocess.run(
            self.shell(step), cwd=self.folder, env=self.environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{step.commands}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def serve(self, step: Step) -> None:
        self.server.close()
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                self.shell(step), cwd=self.folder, env=self.environ, stdout=log, stderr=log, start_new_session=True
            )
        self.server.callback(stop, process)
        self.server.callback(interrupt, process)
        self.server.enter_context(ended_with_us(process))

        def said() -> str:
            assert process.poll() is None, f"the server ended:\n{log_tail(self.log)}"
            return self.log.read_text(errors="replace")

        until_shown(step._replace(shown=(*step.shown, "...ready to roll...")), said)


def check_extras(command: str) -> None:
    """What this environment was made with knows them."""
    [names] = re.findall(r"pip install '\.\[([a-z,]+)\]'", command)
    assert set(names.split(",")) <= set(metadata("sglang-deltastore").get_all("Provides-Extra", []))


def until_shown(step: Step, output: Callable[[], str]) -> None:
    until = time.monotonic() + TIMEOUT_S
    while line := missing(step.shown, printed := output()):
        assert time.monotonic() < until, f"{step.commands}\n{line!r} is not in:\n{printed}"
        time.sleep(2)


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)


@pytest.fixture
def terminals(tmp_path: Path, smollm2: Path) -> Iterator[Terminals]:
    found = Terminals(tmp_path, cache_folder() / "models")
    with found.server:
        yield found


@pytest.mark.slow
def test_a_reader_can_follow_it(terminals: Terminals) -> None:
    for step in steps_of(text_of("docs/tutorial.md")):
        terminals.follow(step)


def test_what_is_not_shown_is_seen() -> None:
    text = "```\nls\n```\nsays\n```text\na ... c\nlast 1...%\n```\n"
    assert steps_of(text) == [Step("ls\n", ("a ... c", "last 1...%"))]
    [step] = steps_of(text)
    assert missing(step.shown, "a  b c\nelse\n last 17 % \n") is None
    assert missing(step.shown, "last 17 %\na c\n") == "last 1...%", "in another order"
    assert missing(step.shown, "a b c\nlast 27 %") == "last 1...%"
