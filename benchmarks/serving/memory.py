"""Resident memory of servers with all their processes, watched from outside."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType

import psutil

SAMPLE_S = 1.0


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it started."""
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def resident_bytes(processes: list[psutil.Process]) -> int:
    """Sum of RSS; pages that processes share count for each. Those that have ended count nothing."""
    total = 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


class PeakMemory:
    """`with PeakMemory({name: pid}) as peak:` then `peak.bytes[name]`: the largest sum of RSS seen each second."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._families = {name: family(pid) for name, pid in pids.items()}
        self.bytes = dict.fromkeys(pids, 0)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            for name, processes in self._families.items():
                self.bytes[name] = max(self.bytes[name], resident_bytes(processes))
            if self._done.wait(SAMPLE_S):
                return
