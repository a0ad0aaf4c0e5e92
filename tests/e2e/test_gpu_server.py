"""A server on a real GPU: it serves, is looked at while it works, evicts, and loses nothing (make test-gpu)."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from sglang_deltastore.host.server_process import Server, serve
from tests import budgets
from tests.e2e.client import flush, generate, prompt, score
from tests.e2e.conftest import DELTASTORE, UNCALIBRATED

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

CAPACITY_TOKENS, REQUESTS, AT_ONCE = 4096, 40, 8
ARGUMENTS = (
    *DELTASTORE, *UNCALIBRATED, "--device", "cuda", "--dtype", "bfloat16", "--random-seed", "1", "--enable-metrics",
    "--max-total-tokens", str(CAPACITY_TOKENS), "--max-running-requests", str(AT_ONCE), "--chunked-prefill-size", "256",
)  # fmt: skip


def looked_at(server: Server, done: threading.Event) -> int:
    """Facts, metrics and SGLang's own state, again and again; how often."""
    looks = 0
    while not done.wait(0.2):
        server.store_stats()
        for path in ("/metrics", "/server_info", "/deltastore"):
            requests.get(server.url + path, timeout=60).raise_for_status()
        looks += 1
    return looks


@pytest.mark.parametrize("kernels", ["flashinfer", "triton"])
def test_it_serves_is_looked_at_and_evicts(kernels: str, smollm2: Path, tmp_path: Path) -> None:
    arguments = (*ARGUMENTS, "--kv-compress-kernels", kernels)
    done = threading.Event()
    with serve(smollm2, arguments, log_path=tmp_path / "log") as server, ThreadPoolExecutor(AT_ONCE + 1) as threads:
        looking = threads.submit(looked_at, server, done)
        # Five groups that share 256 tokens; together three times what the pool holds.
        prompts = [prompt(256, seed=number % 5) + prompt(60, seed=100 + number) for number in range(REQUESTS)]
        answers = list(threads.map(lambda ids: generate(server, ids, tokens=40), prompts))
        done.set()
        assert looking.result() > 0
        assert all(answer["meta_info"]["completion_tokens"] == 40 for answer in answers)
        assert server.store_stats().evictions > 0, "the pool never ran full: this tested nothing"
        flush(server)
        stats = server.store_stats()
        assert stats.pages_free == stats.pages_total
        assert stats.accounting_errors == ()
        assert server.is_healthy()


def test_log_probabilities_are_the_cpu_s(smollm2: Path, tmp_path: Path) -> None:
    ids, found = prompt(200, seed=3), {}
    for device in ("cpu", "cuda"):
        arguments = (*ARGUMENTS, "--device", device, "--dtype", "float32")
        with serve(smollm2, arguments, log_path=tmp_path / device) as server:
            score(server, ids[:96], 1)
            found[device] = score(server, ids, 96)
    differences = [abs(a - b) for a, b in zip(found["cpu"], found["cuda"], strict=True)]
    assert sum(differences) / len(differences) < budgets.SERVED_KERNELS_NATS
