"""One workload through all sides at one budget: slices of the same requests, one side after the other.

A machine's speed drifts; a slice lasts seconds, and the side that begins changes from slice to slice, so that drift
meets all sides alike. The servers that wait their turn sleep.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sglang_deltastore.host.server_process import Server, serve

from .case import Case
from .client import Answer, Counters, ask, flush
from .memory import PeakMemory
from .sides import check_bytes
from .workloads import Request, words

SLICE_REQUESTS = 8
_WARM_UP_TOKENS = (64, 400)


@dataclass
class Measured:
    """What one side did."""

    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0
    counters: Counters = field(default_factory=lambda: Counters(0, 0, 0))
    peak_rss_bytes: int = 0

    def row(self) -> dict[str, Any]:
        """Figures by name."""
        ttft_ms = sorted(answer.ttft_ms for answer in self.answers)
        return {
            "ttft_p50_ms": statistics.median(ttft_ms),
            "ttft_p99_ms": quantile(ttft_ms, 0.99),
            "output_tokens_per_s": sum(len(answer.output_ids) for answer in self.answers) / self.seconds,
            "prompt_tokens": sum(answer.prompt_tokens for answer in self.answers),
            "computed_tokens": sum(answer.computed_tokens for answer in self.answers),
            "cached_tokens": sum(answer.cached_tokens for answer in self.answers),
            "evicted_tokens": int(self.counters.evicted_tokens),
            "retracted_requests": int(self.counters.retracted_requests),
            "peak_rss_bytes": self.peak_rss_bytes,
            "wall_s": self.seconds,
        }


def compare(case: Case, folder: Path) -> list[dict[str, Any]]:
    """A row for each side; the servers' logs go into `folder`."""
    with ExitStack() as stack, ThreadPoolExecutor(len(case.sides)) as starting:
        begun = {
            side: starting.submit(
                stack.enter_context, serve(case.model, side.arguments(), log_path=folder / f"{side.name}.log")
            )
            for side in case.sides
        }
        servers = {side.name: start.result() for side, start in begun.items()}
        for side in case.sides:
            check_bytes(side, servers[side.name], case.budget_bytes)
        measured = measure(servers, case.requests, case.running)
    return [{"benchmark": "serving", **case.row(side), **measured[side.name].row()} for side in case.sides]


def measure(servers: Mapping[str, Server], requests: Sequence[Request], running: int) -> dict[str, Measured]:
    """All requests through all servers, slice by slice. Raises WrongAnswer, or RuntimeError where a server counts other
    tokens than its clients."""
    measured = {name: Measured() for name in servers}
    for server in servers.values():
        _warm_up(server)
    before = {name: Counters.read(server.url) for name, server in servers.items()}
    with (
        PeakMemory({name: server.process.pid for name, server in servers.items()}) as peak,
        tqdm(total=len(requests) * len(servers), unit="request", file=sys.stderr) as bar,
    ):
        for number, some in enumerate(slices(requests)):
            for name in turned(list(servers), number):
                bar.set_description(name)
                begin = time.perf_counter()
                measured[name].answers += run_slice(servers[name].url, some, running)
                measured[name].seconds += time.perf_counter() - begin
                bar.update(len(some))
    for name, server in servers.items():
        own = measured[name]
        own.counters, own.peak_rss_bytes = Counters.read(server.url).since(before[name]), peak.bytes[name]
        check_counts(name, own)
    return measured


def run_slice(url: str, requests: Sequence[Request], running: int) -> list[Answer]:
    """Up to `running` at once, begun in their order; a session's turn waits for the one before it."""
    with ThreadPoolExecutor(running) as clients:
        last_of: dict[int, Future[Answer]] = {}
        asked = []
        for request in requests:
            earlier = last_of.get(request.session)
            last_of[request.session] = clients.submit(_ask_after, earlier, url, request)
            asked.append(last_of[request.session])
        return [future.result() for future in asked]


def _ask_after(earlier: Future[Answer] | None, url: str, request: Request) -> Answer:
    if earlier:
        earlier.result()  # it was begun before this one: somebody is at it
    return ask(url, request.prompt, request.answer_tokens)


def check_counts(name: str, measured: Measured) -> None:
    """Tokens computed as the clients see them are those that the server says it has computed; what retracted requests
    compute once more, only the server sees. Raises RuntimeError."""
    seen = sum(answer.computed_tokens for answer in measured.answers)
    counted, retracted = measured.counters.computed_tokens, measured.counters.retracted_requests
    if counted < seen or (counted > seen and not retracted):
        raise RuntimeError(
            f"{name}: its answers say that {seen} prompt tokens were computed, its own counter {counted:.0f}, "
            f"with {retracted:.0f} requests retracted"
        )


def slices(requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
    for start in range(0, len(requests), SLICE_REQUESTS):
        yield requests[start : start + SLICE_REQUESTS]


def turned(names: list[str], number: int) -> list[str]:
    """The names, each round another in front."""
    first = number % len(names)
    return names[first:] + names[:first]


def quantile(ordered: Sequence[float], share: float) -> float:
    """The least value that `share` of all do not exceed."""
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _warm_up(server: Server) -> None:
    """First requests pay for memory and code that is loaded on first use."""
    for tokens in _WARM_UP_TOKENS:
        ask(server.url, words(tokens, random.Random(tokens)), 4)
    flush(server.url)
