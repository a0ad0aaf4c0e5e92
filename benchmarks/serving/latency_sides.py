"""The servers that `latency` compares, and one that is looked at while it works."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import requests

from benchmarks.checkout import environ_of
from sglang_deltastore.host.server_process import Server
from sglang_deltastore.lab.provenance import commit_of

_POLLED = ", polled"
_AT = " at "
_TIMEOUT_S = 120


def sides(
    tier: str, against: Path | None, polled: bool, device: str
) -> dict[str, tuple[tuple[str, ...], dict[str, str] | None]]:
    """Name -> arguments of the server, and its environment; None: this process's."""
    ours = ("--kv-compress", "deltastore", "--kv-compress-calibration", "none", "--kv-compress-tier")
    own = (*ours, tier)
    stock = ("--attention-backend", "torch_native") if device == "cpu" else ()  # else what SGLang itself chooses
    found = {"stock": (stock, None), "raw": ((*ours, "raw"), None)}
    found[tier] = (own, None)
    if polled:
        found[tier + _POLLED] = ((*own, "--enable-metrics"), None)
    if against:
        found[f"{tier}{_AT}{commit_of(against) or against}"] = (own, environ_of(against))
    return found


def beside(side: str, names: Iterable[str]) -> str | None:
    """With whom a side is compared turn by turn: a polled tier with itself unpolled, a tier with another commit's."""
    if side.endswith(_POLLED):
        return side.removesuffix(_POLLED)
    return next((name for name in names if name.startswith(side + _AT)), None)


@contextmanager
def polling(servers: Mapping[str, Server]) -> Iterator[None]:
    """Asks the polled servers for facts and metrics once a second, as a dashboard and Prometheus would."""
    done = threading.Event()
    asked = [server for name, server in servers.items() if name.endswith(_POLLED)]

    def poll() -> None:
        while not done.wait(1):
            for server in asked:
                server.store_stats()
                requests.get(server.url + "/metrics", timeout=_TIMEOUT_S).raise_for_status()

    with ThreadPoolExecutor(1) as threads:
        polling = threads.submit(poll)
        try:
            yield
        finally:
            done.set()
            polling.result()
