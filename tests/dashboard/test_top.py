"""`deltastore top` as a user runs it, over facts made up for it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

from rich.console import Console

from sglang_deltastore.observe.stats import StoreStats
from sglang_deltastore.observe.top import render
from sglang_deltastore.seam import facts
from tests.dashboard.conftest import FactServer
from tests.observe.test_stats import scheduler

HOSTILE = "\x1b[2J\x1b]0;owned\x07[red]tea\nfor two[/red]"


def real() -> dict[str, Any]:
    return facts.LiveFacts(scheduler()).fresh().as_dict() | {"snapshot_seconds": 0.001}


def start(server: FactServer, *options: str) -> subprocess.Popen[str]:
    url = server.url.removesuffix("/deltastore") + "/"
    command = [sys.executable, "-m", "sglang_deltastore.cli", "top", "--url", url, "--interval", "0.1", *options]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A background job of a shell ignores it, and so would whatever the job starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 (it sets one flag)
    )


def test_it_watches_until_it_is_interrupted(fact_server: FactServer) -> None:
    fact_server.facts = [real()]
    watching = start(fact_server, "--json")
    assert watching.stdout is not None
    lines = [watching.stdout.readline() for _ in range(3)]
    watching.send_signal(signal.SIGINT)
    assert watching.wait(timeout=30) == 0
    assert [json.loads(line) for line in lines] == fact_server.facts * 3


def test_the_live_view(fact_server: FactServer) -> None:
    fact_server.facts = [real()]
    watching = start(fact_server)
    while fact_server.paths.count("/deltastore/stats") < 3 and watching.poll() is None:
        pass
    watching.send_signal(signal.SIGINT)
    shown, errors = watching.communicate(timeout=30)
    assert watching.returncode == 0, errors
    assert "hottest nodes" in shown and "4.13x" in shown


def test_a_server_that_says_no(fact_server: FactServer) -> None:
    fact_server.facts = 401
    done = start(fact_server, "--once")
    _, errors = done.communicate(timeout=30)
    assert done.returncode == 1
    assert "401" in errors and "what opens it with --api-key" in errors
    assert "Traceback" not in errors


def test_the_terminal_obeys_nothing_that_users_wrote() -> None:
    values = real()
    values["nodes"][0]["text"] = HOSTILE
    values["accounting_errors"] = ["1 pages lost"]
    console = Console(width=160, record=True, force_terminal=True)
    with console.capture() as captured:
        console.print(render(StoreStats.from_dict(values)))
    shown = captured.get()
    assert "\x1b[2J" not in shown and "\x1b]0" not in shown and "\x07" not in shown
    assert "[red]tea for two[/red]" in shown
    assert "accounting: 1 pages lost" in shown


def test_what_other_sizes_of_memory_would_find() -> None:
    values = real() | {"hit_rate_0_25x": 0.125, "hit_rate_8x": 0.75, "hit_rate_prompt_tokens": 4321}
    console = Console(width=160)
    with console.capture() as captured:
        console.print(render(StoreStats.from_dict(values)))
    shown = captured.get()
    for words in ("0.25x: 800 tokens", "12.5%", "8x: 25,600 tokens", "75.0%", "4,321"):
        assert words in shown


def test_the_canary_is_shown_where_there_is_one() -> None:
    values = real()
    assert "raw attention" not in shown(values)
    part = {"tokens": 10, "kl_mean": 0.0123, "top1_agreement": 1.0, "kl_worst": 0.1}
    values["canary_by_hit"]["50%"] = part
    watched = shown(values | {"canary_share": 0.01, "canary_tokens": 10, "canary_kl_mean": 0.0071})
    assert "against raw attention" in watched and "0.0071" in watched
    assert "found stored: up to 50%" in watched and "0.012" in watched
    assert "found stored: up to 90%" not in watched, "nothing was compared there"


def shown(values: dict[str, Any]) -> str:
    console = Console(width=160)
    with console.capture() as captured:
        console.print(render(StoreStats.from_dict(values)))
    return captured.get()
