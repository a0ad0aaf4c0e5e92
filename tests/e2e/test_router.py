"""Two servers behind SGLang's own router, over one folder of pages: prompts go where their beginning is stored, and
when that server is gone the other goes on from what it has written."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from sglang_deltastore.host.server_process import Server, free_port, stop
from tests.e2e.conftest import StartServer
from tests.e2e.test_replicas import pages_in
from tests.e2e.test_storage import PAGE_TOKENS, STORAGE

pytestmark = pytest.mark.slow

MOST_SECONDS = 120
TEXTS = [" ".join(f"{name}{i}" for i in range(120)) for name in ("river", "bridge", "garden")]


@dataclass(frozen=True)
class Router:
    url: str

    def ask(self, text: str) -> tuple[str, int, int]:
        """The answer, tokens of the prompt, and those of them that were cached."""
        sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
        body = {"text": text, "sampling_params": sampling}
        answer = requests.post(f"{self.url}/generate", json=body, timeout=MOST_SECONDS)
        answer.raise_for_status()
        meta = answer.json()["meta_info"]
        return answer.json()["text"], meta["prompt_tokens"], meta["cached_tokens"]


@pytest.fixture
def servers(start_server: StartServer, tmp_path: Path) -> list[Server]:
    return [start_server(*STORAGE, *pages_in(tmp_path / "pages")) for _ in range(2)]


@pytest.fixture
def router(servers: list[Server], tmp_path: Path) -> Iterator[Router]:
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "sglang_router.launch_router", "--port", str(port), "--policy", "cache_aware"]
    options = ["--prometheus-port", str(free_port()), "--worker-urls", *(server.url for server in servers)]
    with (tmp_path / "router.log").open("wb") as log, subprocess.Popen([*command, *options], stdout=log) as process:
        try:
            wait_for_workers(url, len(servers))
            yield Router(url)
        finally:
            process.kill()


def wait_for_workers(url: str, count: int) -> None:
    until = time.monotonic() + MOST_SECONDS
    found = -1
    while found != count:
        assert time.monotonic() < until, f"the router knows {found} of {count} workers"
        time.sleep(0.5)
        try:
            found = requests.get(f"{url}/workers", timeout=5).json()["total"]
        except requests.ConnectionError:
            continue


def test_prompts_go_where_they_are_stored_and_outlive_a_server(router: Router, servers: list[Server]) -> None:
    first = [router.ask(text) for text in TEXTS]
    assert [cached for _, _, cached in first] == [0] * len(TEXTS)
    again = [router.ask(text) for text in TEXTS]
    whole_pages = [(prompt_tokens - 1) // PAGE_TOKENS * PAGE_TOKENS for _, prompt_tokens, _ in first]
    assert [cached for _, _, cached in again] == whole_pages, "as one server would have found them"
    wait_until_written(servers, sum(whole_pages) // PAGE_TOKENS)
    gone, left = sorted(servers, key=lambda server: server.store_stats().stored_tokens, reverse=True)
    stop(gone.process)
    found = [ask_until_answered(router, text) for text in TEXTS]
    assert [cached for _, _, cached in found] == whole_pages, "from files"
    assert [text for text, _, _ in found] == [text for text, _, _ in again]
    assert left.store_stats().storage_loaded_pages > 0


def wait_until_written(servers: list[Server], pages: int) -> None:
    until = time.monotonic() + MOST_SECONDS
    while (written := sum(server.store_stats().storage_written_pages for server in servers)) < pages:
        assert time.monotonic() < until, f"{written} of {pages} pages have been written"
        time.sleep(0.1)


def ask_until_answered(router: Router, text: str) -> tuple[str, int, int]:
    """It takes the router a few failures to notice that a server is gone."""
    until = time.monotonic() + MOST_SECONDS
    while True:
        try:
            return router.ask(text)
        except requests.RequestException:
            assert time.monotonic() < until
            time.sleep(1)
