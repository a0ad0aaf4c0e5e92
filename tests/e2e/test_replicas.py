"""--data-parallel-size: each replica has a store and a tree of its own, and reads what another has put into files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from sglang_deltastore.cli import main
from sglang_deltastore.host.server_process import Server, ServerFailed
from tests.e2e.client import flush, generate, prompt
from tests.e2e.conftest import StartServer, of_ranks
from tests.e2e.test_host_memory import answer
from tests.e2e.test_storage import PAGE_TOKENS, STORAGE, STORED_TOKENS, TURN, wait_until_stored

pytestmark = pytest.mark.slow

REPLICAS = 2
TEXT = (Path(__file__).parents[2] / "LICENSE").read_text()[:8000]
"""Two sequences: short enough to be read in seconds."""
ARGUMENTS = (*STORAGE, "--enable-metrics", "--data-parallel-size", str(REPLICAS))


def pages_in(folder: Path) -> tuple[str, str]:
    config = {"file_storage_path": str(folder), "prefetch_threshold": 2 * PAGE_TOKENS}
    return "--hicache-storage-backend-extra-config", json.dumps(config)


# First: while it waits, SGLang's process that deals requests out takes a whole core, which a start would want.
def test_a_refusal_of_one_ends_the_start(start_server: StartServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ServerFailed) as failure:
        start_server(*ARGUMENTS, *pages_in(tmp_path / "file" / "pages"), environ=os.environ | of_ranks(REPLICAS))
    assert "the scheduler refused to start; its reason is above" in str(failure.value)
    assert "--hicache-storage-backend file: " in str(failure.value)


def test_one_that_proves_nothing_ends_the_start(start_server: StartServer, tmp_path: Path) -> None:
    """The first to be ready does, the other does not."""
    (tmp_path / "sitecustomize.py").write_text(
        "from sglang.srt.runtime_context import get_parallel\n"
        "from sglang_deltastore.seam import proof\n"
        "whole = proof.add_proof\n"
        "proof.add_proof = lambda info, scheduler: info if get_parallel().dp_rank else whole(info, scheduler)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with pytest.raises(ServerFailed) as failure:
        start_server(
            *ARGUMENTS, *pages_in(tmp_path / "pages"), environ=os.environ | of_ranks(REPLICAS) | {"PYTHONPATH": path}
        )
    assert "deltastore asked for, but scheduler 0 did not prove that it is in force" in str(failure.value)


@pytest.fixture(scope="module")
def server(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """As somebody starts it for the first time with a model."""
    folder = tmp_path_factory.mktemp("replicas")
    (folder / "text").write_text(TEXT)
    calibration = ("--kv-compress-calibration", "auto", "--kv-compress-calibration-text", str(folder / "text"))
    environ = os.environ | of_ranks(REPLICAS) | {"XDG_CACHE_HOME": str(folder / "cache")}
    started = start_server(*ARGUMENTS, *calibration, *pages_in(folder / "pages"), environ=environ)
    yield started
    started.process.terminate()
    started.process.wait()


def test_one_calibrates_for_both(server: Server) -> None:
    assert server.log_path.read_text().count("DeltaStore: calibrated in ") == 1
    assert [server.store_stats(replica).calibrated for replica in range(REPLICAS)] == [True, True]


def test_each_has_a_tree_and_reads_what_the_other_wrote(server: Server) -> None:
    answer(server, TURN, routed_dp_rank=0)
    hot, meta = answer(server, TURN, routed_dp_rank=0)
    assert meta["cached_tokens_details"]["device"] == STORED_TOKENS
    assert server.store_stats(1).stored_tokens == 0
    wait_until_stored(server, STORED_TOKENS // PAGE_TOKENS)
    loaded, meta = answer(server, TURN, routed_dp_rank=1)
    assert meta["cached_tokens_details"]["storage"] == STORED_TOKENS
    assert loaded == hot
    assert [server.store_stats(replica).storage_loaded_pages > 0 for replica in range(REPLICAS)] == [False, True]


def test_requests_are_dealt_out_and_each_replica_accounts_for_its_own(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [server.store_stats(replica).requests for replica in range(REPLICAS)]
    with ThreadPoolExecutor(4) as clients:
        list(clients.map(lambda seed: generate(server, prompt(200, seed), 8), range(10, 22)))
    after = [server.settled_stats(replica) for replica in range(REPLICAS)]
    served = [stats.requests - earlier for stats, earlier in zip(after, before, strict=True)]
    assert sum(served) == 12
    assert min(served) > 2
    for replica, stats in enumerate(after):
        assert stats.replica == replica
        assert (stats.census_current, stats.accounting_errors, stats.untracked_tokens) == (True, (), 0)
        assert main(["top", "--url", server.url, "--once", "--json", "--replica", str(replica)]) == 0
        assert json.loads(capsys.readouterr().out)["stored_tokens"] == stats.stored_tokens
    assert main(["top", "--url", server.url, "--once", "--replica", "2"]) == 1
    assert "--replica 2: the server has 2" in capsys.readouterr().err
    series = requests.get(server.url + "/metrics", timeout=60).text.splitlines()
    stored = [line for line in series if line.startswith("deltastore:stored_tokens{")]
    assert sorted(float(line.rsplit(" ", 1)[1]) for line in stored) == sorted(stats.stored_tokens for stats in after)
    flush(server)
    for replica in range(REPLICAS):
        stats = server.settled_stats(replica)
        assert (stats.pages_free, stats.frames_free) == (stats.pages_total, stats.frames_total)
