"""Hours of mixed load with faults on one DeltaStore server: nothing is lost, memory stays flat, answers stay the same.

    python -m benchmarks.serving.soak --minutes 60

Clients hold conversations and branches of them in a pool far too small, hang up, abort, are killed with SIGKILL, and
flush while others run; the server is ended in mid-load, by SIGKILL and by SIGTERM in turn, and started again. Every so
often all clients pause; the idle server must then own every page and frame, give them all back on a flush, and answer
probes with the very tokens of before any load.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm

from benchmarks.provenance import provenance
from sglang_deltastore.host import model_path
from sglang_deltastore.host.server_process import Server, free_port, serve
from sglang_deltastore.observe.stats import StoreStats
from sglang_deltastore.policy.tiers import DEFAULT_TIER, SERVED_TIERS

from .client import WrongAnswer, flush
from .memory import family, resident_bytes
from .soak_clients import Clients, Probe
from .workloads import words

CLIENTS, CAPACITY_TOKENS, PAGE_TOKENS = 6, 768, 16
PROBE_TOKENS = (40, 200, 331)
PROBE_ANSWER_TOKENS = 6
PAUSES_PER_LIFE = 4
LIFE_MINUTES = 12.0
"""Load between two starts of the server; there are at least two."""
PAUSE_TIMEOUT_S = 300
LOAD_BEFORE_END_S = 10

MOST_GROWTH_MB = 16
"""Of the server's processes from the first pause of a life to its last. Seen was less than 1; three quarters of a life
of an hour's soak are some 300 requests, so that a leak of 0.05 MB a request is found."""

LARGE_BLOCK_BYTES = 128 * 1024
"""Larger blocks go back to the system when they are freed. glibc raises this limit by itself as far as 32 MiB and then
keeps freed log-probabilities of prompts in its heap: resident memory would be that of the largest batches so far (up to
83 MB in a life), beside which no leak can be seen."""

REQUIRED = ("turns", "branches", "hung_up", "aborted", "killed", "flushes", "probes", "restarts", "retractions")
"""A soak in which one of these never happened has tested less than it says."""


@dataclass
class Outcome:
    """What happened, and everything that must not have."""

    counts: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    rss_mb: list[list[float]] = field(default_factory=list)
    growth_mb: float = 0.0
    retractions: int = 0
    worst_probe_nats: float = 0.0
    seconds: float = 0.0


def main() -> int:
    arguments = _parser().parse_args()
    outcome = soak(arguments.model or str(model_path()), arguments.minutes, arguments.seed, arguments.tier)
    row = {"benchmark": "soak", "tier": arguments.tier, "seed": arguments.seed, **asdict(outcome), **provenance()}
    print(json.dumps(row, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(row) + "\n")
    return 1 if outcome.failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60, help="of load, starts not counted (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what the clients do (default: %(default)s)")
    parser.add_argument("--tier", default=DEFAULT_TIER, choices=SERVED_TIERS, help="default: %(default)s")
    parser.add_argument("--model", help="Hugging Face folder (default: the embedded SmolLM2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the row")
    return parser


def soak(
    model: str | Path,
    minutes: float,
    seed: int = 0,
    tier: str = DEFAULT_TIER,
    required: tuple[str, ...] = REQUIRED,
) -> Outcome:
    """Run it. Raises ServerFailed where a server does not start; all else is in the outcome's failures."""
    outcome, begin = Outcome(), time.monotonic()
    lives = max(2, round(minutes / LIFE_MINUTES))
    pause_every_s = minutes * 60 / lives / PAUSES_PER_LIFE
    port = free_port()
    clients = Clients(f"http://127.0.0.1:{port}", CLIENTS, seed)
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=lives * PAUSES_PER_LIFE, unit="pause", file=sys.stderr) as bar,
    ):
        try:
            for life in range(lives):
                log_path = Path(folder) / f"server-{life}.log"
                with serve(model, _options(tier), log_path=log_path, port=port, environ=_environ()) as server:
                    clients.probes = clients.probes or _probes(server, seed)
                    rss = _live(server, clients, outcome, f"life {life}", pause_every_s, bar)
                    outcome.rss_mb.append([round(value / 2**20, 1) for value in rss])
                    if life < lives - 1:
                        clients.begin()
                        time.sleep(min(pause_every_s, LOAD_BEFORE_END_S))
                        clients.server_goes()
                        if life % 2 == 0:
                            _kill(server)
                outcome.retractions += log_path.read_text(errors="replace").count("Retract requests")
        finally:
            clients.stop()
    _sum_up(outcome, clients, lives, required)
    outcome.seconds = time.monotonic() - begin
    return outcome


def _live(server: Server, clients: Clients, outcome: Outcome, name: str, pause_every_s: float, bar: tqdm) -> list[int]:
    """One life of a server, load and pauses in turn; its resident bytes at each pause."""
    _check_idle(server, clients.probes, outcome, f"{name}, before any load")
    rss = []
    for pause in range(PAUSES_PER_LIFE):
        clients.begin()
        time.sleep(pause_every_s)
        if not clients.pause(PAUSE_TIMEOUT_S):
            outcome.failures.append(f"{name}, pause {pause}: after {PAUSE_TIMEOUT_S} s some requests have no answer")
            break
        _check_idle(server, clients.probes, outcome, f"{name}, pause {pause}")
        rss.append(resident_bytes(family(server.process.pid)))
        bar.set_postfix(failures=len(outcome.failures) + len(clients.failures), done=clients.counts.total())
        bar.update()
    return rss


def _options(tier: str) -> list[str]:
    """Admit as if answers were short, so that the pool runs full while requests run."""
    return [
        "--device", "cpu", "--dtype", "float32", "--page-size", str(PAGE_TOKENS), "--sleep-on-idle",
        "--random-seed", "1", "--max-total-tokens", str(CAPACITY_TOKENS), "--max-running-requests", str(CLIENTS),
        "--chunked-prefill-size", "128", "--schedule-conservativeness", "0.05",
        "--kv-compress", "deltastore", "--kv-compress-tier", tier, "--kv-compress-calibration", "none",
    ]  # fmt: skip


def _environ() -> dict[str, str]:
    """Clients take their share of the cores, so OpenMP's threads must not spin; resident memory is what is in use."""
    return {
        "OMP_WAIT_POLICY": "passive",
        **os.environ,
        "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "8",
        "MALLOC_MMAP_THRESHOLD_": str(LARGE_BLOCK_BYTES),
    }


def _probes(server: Server, seed: int) -> list[Probe]:
    """What an idle server answers, before any load."""
    pick = random.Random(f"probes {seed}")
    return [Probe.ask_idle(server.url, words(tokens, pick), PROBE_ANSWER_TOKENS) for tokens in PROBE_TOKENS]


def _check_idle(server: Server, probes: list[Probe], outcome: Outcome, where: str) -> None:
    """All pages and frames are accounted for, a flush frees them, and probes get the answers of before any load."""
    stats = server.settled_stats(timeout_s=PAUSE_TIMEOUT_S)
    _expect(outcome, where, stats, pages_running=0, frames_running=0, accounting_errors=(), census_current=True)
    total = CAPACITY_TOKENS // PAGE_TOKENS
    if stats.pages_free + stats.pages_in_nodes != total:
        outcome.failures.append(f"{where}: {stats.pages_free} pages free, {stats.pages_in_nodes} in nodes, of {total}")
    try:
        for probe in probes:
            again = Probe.ask_idle(server.url, probe.prompt, PROBE_ANSWER_TOKENS)
            if other := probe.differences(again):
                outcome.failures.append(f"{where}: a probe of {len(probe.prompt)} tokens has other {other}")
        flush(server.url)
    except (requests.RequestException, WrongAnswer) as error:
        outcome.failures.append(f"{where}: {error}")  # a flush fails where something still runs
    stats = server.settled_stats(timeout_s=PAUSE_TIMEOUT_S)
    _expect(outcome, where, stats, pages_free=total, frames_free=CLIENTS, accounting_errors=(), untracked_tokens=0)


def _expect(outcome: Outcome, where: str, stats: StoreStats, **expected: Any) -> None:
    found = {name: getattr(stats, name) for name in expected}
    if found != expected:
        outcome.failures.append(f"{where}: {found}, must be {expected}")


def _kill(server: Server) -> None:
    """As the kernel would, out of memory: no goodbye."""
    for process in family(server.process.pid):
        process.kill()


def _sum_up(outcome: Outcome, clients: Clients, lives: int, required: tuple[str, ...] = REQUIRED) -> None:
    outcome.counts = {**clients.counts, "restarts": lives - 1, "retractions": outcome.retractions}
    outcome.failures += clients.failures
    missing = [name for name in required if not outcome.counts.get(name)]
    outcome.failures += [f"there were no {name}: this soak has tested nothing of them" for name in missing]
    outcome.worst_probe_nats = clients.worst_probe_nats
    growths = [life[-1] - life[0] for life in outcome.rss_mb if len(life) == PAUSES_PER_LIFE]
    outcome.growth_mb = max(growths, default=0.0)
    if outcome.growth_mb > MOST_GROWTH_MB:
        outcome.failures.append(f"resident memory grew by {outcome.growth_mb} MB; allowed are {MOST_GROWTH_MB}")


if __name__ == "__main__":
    sys.exit(main())
