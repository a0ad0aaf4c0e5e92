"""What a real server says of other sizes of memory, against the replay of its requests, and what it really found.

    python -m benchmarks.fleet.hit_curve_served --data FOLDER --json FILE          FOLDER has tau_bench/

The airline workload by one client, then by several at once, of the embedded SmolLM2 in memory that holds a part of it.
The replay takes the requests one after another, in the order in which they were sent.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.provenance import provenance, write_rows
from benchmarks.serving.client import Answer, ask
from benchmarks.serving.workloads import Prompt, Sizes, Texts, build
from sglang_deltastore.fleet.formats import Request
from sglang_deltastore.fleet.page_pool import Cache
from sglang_deltastore.fleet.prefix_tree import block_sequence
from sglang_deltastore.fleet.replay import Replay, replay
from sglang_deltastore.host import model_path
from sglang_deltastore.host.server_process import Server, serve
from sglang_deltastore.observe.series import LABELLED
from sglang_deltastore.observe.stats import StoreStats

from .agents import BLOCK_TOKENS as PAGE_TOKENS
from .agents import chained_blocks

SIZES = Sizes(sessions=16, turns=8, context_tokens=1536, system_tokens=384, answer_tokens=8)
CAPACITY_TOKENS, CHUNK_TOKENS = 6144, 512
ARGUMENTS = (
    "--device", "cpu", "--dtype", "float32", "--page-size", str(PAGE_TOKENS), "--max-running-requests", "4",
    "--sleep-on-idle", "--max-total-tokens", str(CAPACITY_TOKENS), "--chunked-prefill-size", str(CHUNK_TOKENS),
    "--kv-compress", "deltastore", "--kv-compress-tier", "k4v2", "--kv-compress-calibration", "none",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 3], metavar="N", help="default: 1 3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON row a line")
    arguments = parser.parse_args()
    prompts = [request.prompt for request in build("airline", Texts(arguments.data, model_path()), SIZES)]
    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(model_path(), ARGUMENTS, log_path=Path(folder) / "log") as server,
    ):
        for clients in arguments.clients:
            rows += measure(server, prompts, clients)
            if arguments.json:
                write_rows(arguments.json, rows)
    _print(rows)
    return 0


def measure(server: Server, prompts: Sequence[Prompt], clients: int) -> Iterator[dict[str, Any]]:
    requests.post(server.url + "/flush_cache?timeout=60", timeout=90).raise_for_status()
    with ThreadPoolExecutor(clients) as pool:
        asked = pool.map(lambda prompt: ask(server.url, prompt, SIZES.answer_tokens), prompts)
        answers = list(tqdm(asked, total=len(prompts), desc=f"{clients} clients", disable=None))
    stats = server.store_stats()
    live = {float(memory): getattr(stats, field) for field, memory in LABELLED["hit_rate"].items()}
    caches = [Cache(int(stats.pages_total * size), PAGE_TOKENS, chunk_tokens=CHUNK_TOKENS) for size in live]
    outcomes = replay(_replayable(prompts, answers), [Replay(cache) for cache in caches])
    prompt_tokens = sum(map(len, prompts))
    if stats.hit_rate_prompt_tokens != prompt_tokens or stats.observation_errors:
        raise RuntimeError(f"the server has looked at {stats.hit_rate_prompt_tokens} of {prompt_tokens} prompt tokens")
    for (size, rate), outcome in zip(live.items(), outcomes, strict=True):
        yield {
            "benchmark": "hit-curve-served",
            "clients": clients,
            "requests": len(prompts),
            "prompt_tokens": prompt_tokens,
            **_of_server(stats),
            "memory": size,
            "served_hit_rate": sum(answer.cached_tokens for answer in answers) / prompt_tokens,
            "replay_hit_rate": outcome.hit_rate,
            "replay_rejected_requests": outcome.rejected_requests,
            "live_hit_rate": rate,
            **provenance(),
        }


def _of_server(stats: StoreStats) -> dict[str, Any]:
    return {"page_tokens": stats.page_tokens, "capacity_tokens": stats.capacity_tokens, "tier": stats.tier}


def _replayable(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> Iterator[Request]:
    ids: dict[tuple[int, tuple[int, ...]], int] = {}
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        stored = chained_blocks([*prompt, *answer.output_ids[:-1]], ids)
        blocks = block_sequence(stored[: len(prompt) // PAGE_TOKENS])
        yield Request(number, len(prompt), len(answer.output_ids), blocks, block_sequence(stored))


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Hit rate by memory of a served workload")
    for name in ("clients", "memory", "replay", "live", "served", "live - replay, points"):
        table.add_column(name, justify="right")
    for row in rows:
        rates = (row["replay_hit_rate"], row["live_hit_rate"])
        table.add_row(
            str(row["clients"]), f"{row['memory']:g}x", *(f"{rate:.2%}" for rate in rates),
            f"{row['served_hit_rate']:.2%}" if row["memory"] == 1 else "", f"{100 * (rates[1] - rates[0]):+.2f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
