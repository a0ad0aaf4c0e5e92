"""Facts want the server's key, need no tokenizer, and cannot end the server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import requests

from sglang_deltastore.host.server_process import Server, stop
from tests.e2e.client import generate, prompt
from tests.e2e.conftest import DELTASTORE, StartServer

pytestmark = pytest.mark.slow

SMALL = (*DELTASTORE, "--max-total-tokens", "2048", "--max-running-requests", "2")


def breaking_plugin(folder: Path) -> dict[str, str]:
    """Another plugin of SGLang's, that makes every event of the mirror raise. Returns the environment that has it."""
    (folder / "breaks_events.py").write_text(
        "def register():\n"
        "    from sglang_deltastore.observe import nodes\n"
        "    def stored(*_args, **_kwargs):\n"
        "        raise RuntimeError('broken on purpose')\n"
        "    nodes.Mirror.stored = stored\n"
    )
    (folder / "breaks_events-1.dist-info").mkdir()
    (folder / "breaks_events-1.dist-info" / "METADATA").write_text("Name: breaks-events\nVersion: 1\n")
    (folder / "breaks_events-1.dist-info" / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\nbreaks = breaks_events:register\n"
    )
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def test_events_that_raise_do_not_end_the_server(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(*SMALL, environ=breaking_plugin(tmp_path))
    before = server.store_stats().observation_errors
    tokens = prompt(200, seed=1)
    generate(server, tokens)
    for seed in range(12):  # more than fits: nodes are evicted, too
        generate(server, prompt(230, seed=100 + seed), 5)
    generate(server, tokens)
    assert generate(server, tokens)["meta_info"]["cached_tokens"] == 192
    stats = server.store_stats()
    assert server.is_healthy()
    assert stats.observation_errors >= before + 15
    assert stats.untracked_tokens == stats.pages_in_nodes * stats.page_tokens > 0
    assert (stats.nodes, stats.accounting_errors, stats.census_current) == ((), (), False)
    log = server.log_path.read_text()
    assert log.count("broken on purpose") < 10, "each kind of failure is logged once"
    assert "observing failed (a request is stored)" in log
    stop(server.process)


@pytest.mark.parametrize(
    ("options", "opens", "does_not"),
    [
        pytest.param(("--api-key", "users"), "users", "wrong", marks=pytest.mark.long),
        pytest.param(("--admin-api-key", "admins"), "admins", "wrong", marks=pytest.mark.long),
        (("--api-key", "users", "--admin-api-key", "admins"), "admins", "users"),
    ],
)
def test_facts_want_the_key(start_server: StartServer, options: tuple[str, ...], opens: str, does_not: str) -> None:
    server = start_server(*SMALL, *options)
    assert status(server, "/deltastore/stats") == 401
    assert status(server, "/deltastore/stats", does_not) == 401
    assert status(server, "/deltastore/stats", opens) == 200
    assert status(server, "/deltastore") == 200, "the page asks for the key"
    for other in ("/deltastore/", "/deltastore/other", "/get_model_info"):
        assert status(server, other) == (401 if "--api-key" in options else status(server, other, opens)), other
    stop(server.process)


def status(server: Server, path: str, key: str | None = None) -> int:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return requests.get(server.url + path, headers=headers, timeout=60, allow_redirects=False).status_code


def test_without_a_tokenizer_there_are_facts_without_text(start_server: StartServer) -> None:
    server = start_server(*SMALL, "--skip-tokenizer-init", "--kv-compress-show-prompts")
    requests.post(
        server.url + "/generate",
        json={"input_ids": prompt(100, seed=1), "sampling_params": {"max_new_tokens": 3}},
        timeout=60,
    ).raise_for_status()
    stats = server.settled_stats()
    assert stats.nodes and all(node.first_token_ids and not node.text for node in stats.nodes)
    assert stats.observation_errors == 0
    stop(server.process)
