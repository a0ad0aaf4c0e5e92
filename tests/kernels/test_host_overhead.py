"""benchmarks/kernels/host_overhead.py measures what it says, against another package too."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

import deltastore_kernels
from benchmarks.kernels import host_overhead
from tests.kernels.cpu_case import fresh_memory_is_nan

assert fresh_memory_is_nan  # fixture; and its module skips where the compiled kernels are missing


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host_overhead, "LAYERS", 2)
    monkeypatch.setattr(host_overhead, "REQUESTS", 3)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_row_has_both_contestants() -> None:
    other = host_overhead.package(Path(deltastore_kernels.__file__).parent)
    row = host_overhead.measure((64, 2, 2), threads=3, rounds=1, other=other)
    assert row["us"] > 0
    assert row["against_us"] > 0
    assert (row["batch"], row["layers"], row["threads"]) == (3, 2, 3)


def test_other_answers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    other = host_overhead.package(Path(deltastore_kernels.__file__).parent)
    plan = importlib.import_module(f"{other.__name__}.ops.attend_decode.cpu").DecodePlan
    right = plan.run
    monkeypatch.setattr(plan, "run", lambda *given: [2 * part for part in right(*given)])
    with pytest.raises(SystemExit, match="differ"):
        host_overhead.measure((64, 2, 2), threads=1, rounds=1, other=other)


def test_the_check_goes_through_every_entry() -> None:
    assert host_overhead.measure_check(rounds=1)["entries"] == 3 * 8192
