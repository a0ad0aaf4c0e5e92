"""What a live server says of other sizes of memory, against the replay of the same requests at those sizes.

    python -m benchmarks.fleet.hit_curve --data FOLDER --json FILE

FOLDER has mooncake/, claude_code_traces/, tau_bench/ and chat/.

The replay at the present size stands for the server: what its requests find is what `HitCurve` is told that they have
found. All else it has from the pages that pass by, as in a server. Traces name blocks; each of their pages gets tokens
of its own, so that pages are hashed as a server hashes them.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.provenance import provenance, write_rows
from benchmarks.serving.workloads import FIRST_WORD, LAST_WORD, Sizes, Texts, build
from sglang_deltastore.fleet.formats import Request
from sglang_deltastore.fleet.page_pool import Cache
from sglang_deltastore.fleet.prefix_tree import block_sequence
from sglang_deltastore.fleet.replay import Replay
from sglang_deltastore.fleet.traces import Trace
from sglang_deltastore.host import model_path
from sglang_deltastore.observe.hit_curve import SIZES, HitCurve, page_keys

from .agents import BLOCK_TOKENS as PAGE_TOKENS
from .agents import chained_blocks
from .results import find

LOOK_EVERY = 50
"""Requests, after which the curve of recent requests is looked at."""
AGENTS = Sizes(sessions=48, turns=12, context_tokens=4096, system_tokens=1024, answer_tokens=24)
CHATS = Sizes(sessions=48, turns=12, context_tokens=2048, system_tokens=1024, answer_tokens=24)


@dataclass(frozen=True)
class Served:
    """A request as the replay knows it, and the tokens of its prompt's whole pages, and of all that is stored."""

    request: Request
    prompt: array[int]
    stored: array[int]


@dataclass(frozen=True)
class Source:
    name: str
    requests: Callable[[Path], Iterator[Served]]
    pages_per_block: int
    capacities_tokens: tuple[int, ...]


def of_trace(pattern: str, sessions_at_once: int = 16) -> Callable[[Path], Iterator[Served]]:
    def requests(data: Path) -> Iterator[Served]:
        trace = Trace(find(data, pattern), PAGE_TOKENS, sessions_at_once=sessions_at_once)
        for request in trace:
            tokens = _tokens(_pages(request.blocks, trace.pages_per_block))
            yield Served(request, tokens, tokens)

    return requests


def _pages(blocks: bytes, pages_per_block: int) -> npt.NDArray[np.int64]:
    """A number for each page; see prefix_tree on partial blocks."""
    ids = np.frombuffer(blocks, "<i8")
    pages = (ids[ids >= 0, None] * pages_per_block + np.arange(pages_per_block)).ravel()
    if len(ids) and ids[-1] < 0:
        block, tail_pages = divmod(-int(ids[-1]) - 1, pages_per_block)
        pages = np.concatenate([pages, block * pages_per_block + np.arange(tail_pages)])
    return pages


def _tokens(pages: npt.NDArray[np.int64]) -> array[int]:
    """Token ids of which each page has its own."""
    tokens = np.zeros((len(pages), PAGE_TOKENS), np.int64)
    for at in range(4):
        tokens[:, at] = pages >> (16 * at) & 0xFFFF
    return array("q", tokens.tobytes())


def of_workload(name: str, sizes: Sizes) -> Callable[[Path], Iterator[Served]]:
    """Conversations of real text, answers of random words: a next turn has the recorded ones."""

    def requests(data: Path) -> Iterator[Served]:
        ids: dict[tuple[int, tuple[int, ...]], int] = {}
        pick = random.Random(1)
        for number, turn in enumerate(build(name, Texts(data, model_path()), sizes)):
            answer = [pick.randrange(FIRST_WORD, LAST_WORD) for _ in range(turn.answer_tokens - 1)]
            stored = chained_blocks([*turn.prompt, *answer], ids)
            prompt_blocks = block_sequence(stored[: len(turn.prompt) // PAGE_TOKENS])
            request = Request(number, len(turn.prompt), turn.answer_tokens, prompt_blocks, block_sequence(stored))
            yield Served(request, array("q", turn.prompt), array("q", [*turn.prompt, *answer]))

    return requests


SOURCES = (
    Source("Mooncake conversation", of_trace("mooncake/conversation_trace*.jsonl*"), 32, (1_000_000, 4_000_000)),
    Source("Mooncake synthetic", of_trace("mooncake/synthetic_trace*.jsonl*"), 32, (1_000_000, 4_000_000)),
    Source(
        "Claude Code, 64 at once", of_trace("claude_code_traces/sessions.jsonl*", 64), 4, (1_000_000, 4_000_000)
    ),
    Source("tau-bench airline agents", of_workload("airline", AGENTS), 1, (16_384, 65_536)),
    Source("OASST and MT-Bench chats", of_workload("branches", CHATS), 1, (16_384,)),
)  # fmt: skip


class Compared:
    """One present size: a curve, and a replay at each size."""

    def __init__(self, source: Source, capacity_tokens: int) -> None:
        self.source, self.capacity_tokens = source, capacity_tokens
        pages = capacity_tokens // PAGE_TOKENS
        self.curve, self.recent = HitCurve(pages, PAGE_TOKENS, window_tokens=np.inf), HitCurve(pages, PAGE_TOKENS)
        self.replays = {
            size: Replay(Cache(int(pages * size), PAGE_TOKENS, source.pages_per_block)) for size in SIZES
        }  # fmt: skip
        #: after each request, since the start: prompt tokens, and those that each size has found
        self.prompt_tokens: list[int] = [0]
        self.found = [dict.fromkeys(SIZES, 0)]
        self.worst_recent = dict.fromkeys(SIZES, 0.0)

    def serve(self, served: Served) -> None:
        request = served.request
        for replay in self.replays.values():
            replay.arrive(request)
        outcome = {size: replay.outcome() for size, replay in self.replays.items()}
        self.found.append({size: each.hit_tokens for size, each in outcome.items()})
        self.prompt_tokens.append(outcome[1.0].prompt_tokens)
        hit_tokens = self.found[-1][1.0] - self.found[-2][1.0]
        findable_pages = (request.prompt_tokens - 1) // PAGE_TOKENS
        prompt_keys = page_keys(served.prompt[:], PAGE_TOKENS)
        stored_keys = page_keys(served.stored[:], PAGE_TOKENS)
        for curve in (self.curve, self.recent):
            curve.asked(prompt_keys[:findable_pages], request.prompt_tokens, hit_tokens)
            curve.used(prompt_keys)
            curve.used(stored_keys)

    def look(self) -> None:
        """The curve of recent requests, against the replays of the same ones."""
        since = bisect_left(self.prompt_tokens, self.prompt_tokens[-1] - self.recent.prompt_tokens)
        for size, rate in self.recent.hit_rates().items():
            found = self.found[-1][size] - self.found[since][size]
            off = rate - found / self.recent.prompt_tokens
            self.worst_recent[size] = max(self.worst_recent[size], off, -off, key=abs)

    def rows(self) -> Iterator[dict[str, Any]]:
        live, sampled = self.curve.hit_rates(), self.curve.sampled_hit_rates()
        for size in SIZES:
            yield {
                "benchmark": "hit-curve",
                "source": self.source.name,
                "requests": len(self.prompt_tokens) - 1,
                "prompt_tokens": self.prompt_tokens[-1],
                "page_tokens": PAGE_TOKENS,
                "capacity_tokens": self.capacity_tokens,
                "sampled_share": self.curve.rate,
                "memory": size,
                "replay_hit_rate": self.found[-1][size] / self.prompt_tokens[-1],
                "live_hit_rate": live[size],
                "sampled_hit_rate": sampled[size],
                "recent_worst_off": self.worst_recent[size],
                **provenance(),
            }


LONG_PROMPT_TOKENS, PROMPTS = 100_000, 50


def cost(capacity_tokens: int) -> dict[str, Any]:
    """Milliseconds, medians, of long prompts that a full memory does not know: found out, taken in, and used again."""
    curve, pick = HitCurve(capacity_tokens // PAGE_TOKENS, PAGE_TOKENS), np.random.default_rng(1)
    for _ in range(int(4 * SIZES[-1])):
        curve.used(pick.integers(0, 2**64, curve.capacity_pages // 4, dtype=np.uint64))
    times: dict[str, list[float]] = {"keys_ms": [], "asked_ms": [], "used_ms": [], "used_again_ms": []}
    for _ in range(PROMPTS):
        tokens = array("q", pick.integers(0, 50_000, LONG_PROMPT_TOKENS).tobytes())
        marks = [time.perf_counter()]
        keys = page_keys(tokens[:], PAGE_TOKENS)
        marks.append(time.perf_counter())
        curve.asked(keys, LONG_PROMPT_TOKENS, 0)
        marks.append(time.perf_counter())
        for _ in range(2):
            curve.used(keys)
            marks.append(time.perf_counter())
        for into, (began, ended) in zip(times.values(), pairwise(marks), strict=True):
            into.append(1e3 * (ended - began))
    medians = {name: statistics.median(each) for name, each in times.items()}
    return {
        "benchmark": "hit-curve-cost",
        "prompt_tokens": LONG_PROMPT_TOKENS,
        "capacity_tokens": capacity_tokens,
        "sampled_share": curve.rate,
        **medians,
        "request_ms": 3 * medians["keys_ms"] + medians["asked_ms"] + medians["used_ms"] + medians["used_again_ms"],
        **provenance(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON row a line")
    parser.add_argument("--requests", type=int, metavar="N", help="only the first of each source")
    arguments = parser.parse_args()
    rows = [cost(capacity_tokens) for capacity_tokens in (1_000_000, 10_000_000)]
    for source in SOURCES:
        compared = [Compared(source, tokens) for tokens in source.capacities_tokens]
        served = itertools.islice(source.requests(arguments.data), arguments.requests)
        for number, each in enumerate(tqdm(served, desc=source.name, disable=None), start=1):
            for one in compared:
                one.serve(each)
                if number % LOOK_EVERY == 0:
                    one.look()
        for one in compared:
            rows += one.rows()
        if arguments.json:
            write_rows(arguments.json, rows)
    for row in rows[:2]:
        memory, prompt = f"{row['capacity_tokens']:,}", f"{row['prompt_tokens']:,}"
        print(f"a prompt of {prompt} tokens costs {row['request_ms']:.2f} ms with {memory} in memory")
    _print([row for row in rows if row["benchmark"] == "hit-curve"])
    return 0


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Hit rate by memory: the replay, and what a live curve is off, in points")
    for name in ("requests of", "present, tokens", "memory", "replay", "live", "by sampling alone", "recent, worst"):
        table.add_column(name, justify="left" if name == "requests of" else "right")
    for row in rows:
        off = (row["live_hit_rate"], row["sampled_hit_rate"])
        table.add_row(
            row["source"], f"{row['capacity_tokens']:,}", f"{row['memory']:g}x", f"{row['replay_hit_rate']:.2%}",
            *(f"{100 * (rate - row['replay_hit_rate']):+.2f}" for rate in off), f"{100 * row['recent_worst_off']:+.2f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
