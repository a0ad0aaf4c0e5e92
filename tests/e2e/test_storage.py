"""Pages that outlive the server: SGLang's storage in files behind host memory, over ends that nobody announced."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from deltastore_kernels.basis import fit_key_basis
from sglang_deltastore.host.server_process import Server
from sglang_deltastore.policy.calibration import Calibration, fingerprint
from tests.e2e.client import flush, prompt
from tests.e2e.conftest import DELTASTORE, StartServer
from tests.e2e.test_host_memory import answer

pytestmark = pytest.mark.slow

#: of SmolLM2, cut to its first layers: what is stored is stored by layer
MODEL = {"num_hidden_layers": 4}
KV_HEADS, HEAD_DIM = 3, 64
PAGE_TOKENS = 16
PROMPT_TOKENS = 394
ANSWER_TOKENS = 24
STORED_TOKENS = 384
TURN = prompt(PROMPT_TOKENS, seed=1)
MOST_SECONDS = 60

STORAGE = (
    *DELTASTORE, "--json-model-override-args", json.dumps(MODEL),
    "--max-total-tokens", "2048", "--max-running-requests", "4",
    "--enable-hierarchical-cache", "--hicache-write-policy", "write_through",
    "--hicache-storage-backend", "file", "--hicache-storage-prefetch-policy", "wait_complete",
)  # fmt: skip

Answer = list[tuple[float, int]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all servers here."""
    return tmp_path_factory.mktemp("storage") / "pages"


@pytest.fixture(scope="module")
def start_next(start_server: StartServer, folder: Path) -> StartServer:
    """start_next(*arguments) -> a server whose pages go to the folder; the one before it is killed."""
    servers: list[Server] = []

    def start(*arguments: str) -> Server:
        if servers:
            os.killpg(servers[-1].process.pid, signal.SIGKILL)
            servers[-1].process.wait()
        config = {"file_storage_path": str(folder), "prefetch_threshold": 2 * PAGE_TOKENS}
        whole = (*STORAGE, "--hicache-storage-backend-extra-config", json.dumps(config), *arguments)
        servers.append(start_server(*whole))
        return servers[-1]

    return start


@pytest.fixture(scope="module")
def calibrations(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of the model: on other text it learns other keys."""
    made = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        layers = []
        for _ in range(MODEL["num_hidden_layers"]):
            mixed = torch.randn(KV_HEADS, HEAD_DIM, HEAD_DIM, generator=generator)
            moment = mixed @ mixed.mT / HEAD_DIM + torch.eye(HEAD_DIM)
            layers.append(fit_key_basis(torch.zeros(KV_HEADS, HEAD_DIM), moment, moment))
        made.append(tmp_path_factory.mktemp("calibrations") / "model.safetensors")
        Calibration(fingerprint(smollm2, MODEL), tuple(layers), {}).save(made[-1])
    return made


def wait_until_stored(server: Server, pages: int) -> None:
    """Until it has written so many."""
    until = time.monotonic() + MOST_SECONDS
    while (written := server.store_stats().storage_written_pages) < pages:
        assert time.monotonic() < until, f"{written} of {pages} pages have been written"
        time.sleep(0.1)


def hot_answer(server: Server) -> Answer:
    """Of the second time that it is asked; none of it comes from the storage, and then all of it is there."""
    answer(server, TURN)
    hot, meta = answer(server, TURN)
    assert meta["cached_tokens_details"] == meta["cached_tokens_details"] | {"device": STORED_TOKENS, "storage": 0}
    wait_until_stored(server, (PROMPT_TOKENS + ANSWER_TOKENS - 1) // PAGE_TOKENS)
    return hot


def answer_from_storage(server: Server, tokens: int = STORED_TOKENS) -> Answer:
    found, meta = answer(server, TURN)
    assert meta["cached_tokens_details"]["storage"] == meta["cached_tokens"] == tokens
    return found


def files_of_turn(folder: Path) -> list[Path]:
    """In the order of its pages, which is the one in which they were written."""
    return sorted(folder.glob("*.bin"), key=lambda path: path.stat().st_mtime_ns)


def test_a_killed_server_goes_on_from_its_files(start_next: StartServer, folder: Path) -> None:
    server = start_next()
    hot = hot_answer(server)
    files = files_of_turn(folder)
    assert len(files) == server.store_stats().storage_written_pages

    server = start_next()
    assert answer_from_storage(server) == hot
    stats = server.settled_stats()
    assert stats.storage_loaded_pages == STORED_TOKENS // PAGE_TOKENS
    assert stats.host_loaded_tokens == STORED_TOKENS
    assert (stats.storage_refused_pages, stats.accounting_errors, stats.observation_errors) == (0, (), 0)

    # A page with another bit, and one that was written in part: the hit ends there, and what follows is written anew.
    turned, torn = 7, 9
    data = bytearray(files[turned].read_bytes())
    data[len(data) // 2] ^= 1
    files[turned].write_bytes(data)
    os.truncate(files[torn], 100)
    for refused, harmed in enumerate((turned, torn), start=1):
        flush(server)
        answer_from_storage(server, harmed * PAGE_TOKENS)
        wait_until_stored(server, refused)
        assert server.store_stats().storage_refused_pages == refused
    flush(server)
    answer_from_storage(server)

    # The folder vanishes, and a file lies in its place.
    away = folder.with_name("away")
    folder.rename(away)
    folder.write_text("")
    flush(server)
    for seed in (1, 2):
        _, meta = answer(server, prompt(PROMPT_TOKENS, seed))
        assert meta["cached_tokens"] == 0
    assert server.is_healthy()
    stats = server.settled_stats()
    assert (stats.accounting_errors, stats.observation_errors, stats.untracked_tokens) == ((), 0, 0)
    folder.unlink()
    away.rename(folder)
    flush(server)
    answer_from_storage(server)


def test_servers_with_other_pages_miss_each_others(start_next: StartServer, calibrations: list[Path]) -> None:
    """All in the folder of the server above, which had no calibration."""
    one, other = (("--kv-compress-calibration", str(path)) for path in calibrations)
    for arguments in (("--kv-compress-tier", "k4v2"), one, other):
        server = start_next(*arguments)
        _, meta = answer(server, TURN)
        assert meta["cached_tokens"] == 0
        stats = server.store_stats()
        assert (stats.storage_loaded_pages, stats.storage_refused_pages) == (0, 0)
        hot = hot_answer(server)
        flush(server)
        assert answer_from_storage(server) == hot
