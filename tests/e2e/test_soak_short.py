"""Two minutes of `python -m benchmarks.serving.soak`: mixed load, every fault, a server ended in mid-load."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.serving.soak import soak

pytestmark = pytest.mark.slow


def test_nothing_is_lost_and_answers_stay_the_same(smollm2: Path) -> None:
    outcome = soak(smollm2, minutes=2, seed=1)
    # A soak that has not met every fault fails as well.
    assert outcome.failures == []
    assert len(outcome.rss_mb) == outcome.counts["restarts"] + 1 == 2
