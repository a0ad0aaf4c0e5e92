"""--tokenizer-worker-num: the processes that answer requests are not the one that was started."""

from __future__ import annotations

import pytest
import requests

from sglang_deltastore.host.server_process import Server
from tests.e2e.client import generate, post, prompt
from tests.e2e.conftest import DELTASTORE, StartServer

pytestmark = pytest.mark.slow

#: each on a connection of its own, so that both workers get some
ASKED, CAPACITY_TOKENS = 12, 2048


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    return start_server(*DELTASTORE, "--tokenizer-worker-num", "2", "--max-total-tokens", str(CAPACITY_TOKENS))


def test_every_worker_has_the_facts_and_the_dashboard(server: Server) -> None:
    for _ in range(ASKED):
        stats = server.store_stats()
        assert (stats.pages_total, stats.accounting_errors) == (CAPACITY_TOKENS // stats.page_tokens, ())
        page = requests.get(server.url + "/deltastore", timeout=60)
        assert (page.status_code, "script-src" in page.headers["Content-Security-Policy"]) == (200, True)


def test_every_worker_refuses_unknown_tokens(server: Server) -> None:
    for _ in range(ASKED):
        answer = post(server, input_ids=[10, 10**6], sampling_params={"max_new_tokens": 1})
        assert answer.status_code == 400, answer.text
        assert "input_ids contains 1000000" in answer.text
    assert len(generate(server, prompt(20, seed=1))["output_ids"]) == 1
