"""Timing on a machine that others use too: contestants take turns, and each keeps its best round."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from deltastore_kernels import native

READ_BYTES = 1 << 28  # far more than the caches of a core hold


#: what a clock reads, in seconds. `cpu` is the calling thread's own time: what it lost to other programs is
#: left out, so it serves for one thread on a machine that others use
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}


def best_us(contestants: dict[str, Callable[[], object]], rounds: int, clock: str = "wall") -> dict[str, float]:
    """Microseconds of each contestant's fastest call. They take turns within a round, so that what else runs on the
    machine slows all alike, and each round another begins: who comes behind the reader finds nothing in the caches."""
    now = CLOCKS[clock]
    best = dict.fromkeys(contestants, float("inf"))
    names = list(contestants)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            begin = now()
            contestants[name]()
            best[name] = min(best[name], (now() - begin) * 1e6)
    return best


def reader() -> Callable[[], object]:
    """The ceiling: merely reads READ_BYTES from memory with the current number of threads. Takes its turn
    like every contestant, so that it meets the same load of the machine."""
    data = torch.ones(READ_BYTES // 4)
    return lambda: native.read_bytes(data)
