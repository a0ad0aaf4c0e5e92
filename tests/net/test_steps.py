"""Steps of attention on a GPU that is not there: the CPU's numbers, no wait, and a bounded number of kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from deltastore_kernels import ops
from deltastore_kernels.layout import RAW, TILE_TOKENS, Format
from tests import budgets
from tests.net.gpu_store import Server, make_store, pretended_ops
from tests.net.pretend_gpu import Watch, pretend_gpu

FORMATS = {
    "packed": (Format(4, 2), False), "calibrated": (Format(4, 3), True), "raw": (RAW, False),
    "windows": (Format(4, 2), False, True),
}  # fmt: skip


class Pair(NamedTuple):
    gpu: Server
    cpu: Server
    watch: Watch


@pytest.fixture(params=FORMATS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """The same server on the pretended GPU and on the host."""
    with pretend_gpu() as watch:
        gpu = Server(make_store("cuda", pretended_ops(watch), *FORMATS[request.param]), "cuda")
        cpu = Server(make_store("cpu", ops.load("reference"), *FORMATS[request.param]), "cpu")
        watch.waits.clear()
        yield Pair(gpu, cpu, watch)


def both(pair: Pair, what: str, argument: object) -> None:
    ours, theirs = (getattr(server, what)(argument) for server in (pair.gpu, pair.cpu))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_life_of_requests_waits_for_nothing(pair: Pair) -> None:
    both(pair, "extend", {0: 37, 1: 5})
    both(pair, "extend", {0: 64, 2: 100, 3: 0})
    for _ in range(2 * TILE_TOKENS + 1):  # over tiles' and pages' ends; request 1 completes its first tile here
        both(pair, "decode", [0, 1, 2])
    both(pair, "extend", {1: 20})
    assert pair.watch.waits == []
    assert torch.equal(pair.gpu.store.sink_of_frame.numbers, pair.cpu.store.sink_of_frame)


def test_kernels_of_a_decode_step(pair: Pair) -> None:
    pair.gpu.extend({0: 37, 1: 5})
    pair.gpu.decode([0, 1])
    assert max(pair.gpu.layers_kernels) <= budgets.GPU_DECODE_KERNELS_PER_LAYER["flashinfer"]
    window_parts = len(pair.gpu.store.bounds) - 1
    once = budgets.GPU_DECODE_KERNELS_PER_STEP + window_parts * budgets.GPU_DECODE_KERNELS_PER_WINDOW_PART
    assert pair.gpu.step_kernels <= once


def test_what_a_decode_step_launches_depends_on_no_length(pair: Pair) -> None:
    """A CUDA graph replays what was recorded at lengths of one."""
    pair.gpu.extend({0: 30, 1: 14})
    counts = []
    for _ in range(4):  # one of them completes tiles
        before = pair.watch.kernels.copy()
        pair.gpu.decode([0, 1])
        counts.append(pair.watch.kernels - before)
    steady = [count for total, count in zip(range(15, 19), counts, strict=True) if total != TILE_TOKENS]
    assert all(count == steady[0] for count in steady)
