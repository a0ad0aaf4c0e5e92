"""Peers' own evaluation harness on our server."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from benchmarks.serving import harness

QUESTIONS = [
    {"goal": f"How do I open door {i}?", "sol1": "Turn the handle.", "sol2": "Turn the moon.", "label": 0}
    for i in range(12)
]


def sample(likelihoods: tuple[float, float], right: bool) -> dict[str, object]:
    """As the harness writes them."""
    return {"filtered_resps": [[str(each), "False"] for each in likelihoods], "acc": right, "acc_norm": right}


def test_what_is_compared() -> None:
    stock = [sample((-1.0, -2.0), True), sample((-3.0, -2.5), False)]
    ours = [sample((-1.5, -2.0), True), sample((-3.0, -4.5), True)]
    row = harness.compared(ours, stock)
    assert (row["items"], row["acc"], row["acc_as_stock"]) == (2, 1.0, 0.5)
    assert (row["mean_difference_nats"], row["largest_difference_nats"]) == (0.625, 2.0)
    assert harness.compared(stock, stock)["acc_stderr"] == 0.5


@pytest.mark.long
def test_the_harness_asks_both(tmp_path: Path) -> None:
    """Its real command line, installed anew."""
    venv.create(tmp_path / "venv", with_pip=True)
    requirements = Path(harness.__file__).with_name("harness-requirements.txt")
    subprocess.run([tmp_path / "venv/bin/pip", "install", "-q", "-r", requirements], check=True)
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    out = tmp_path / "rows.jsonl"
    subprocess.run(
        [
            sys.executable, "-m", "benchmarks.serving.harness", "--piqa", tmp_path / "piqa.jsonl", "--items", "4",
            "--tiers", "lossless", "--lm-eval", tmp_path / "venv/bin/lm_eval", "--json", out,
        ],
        check=True,
    )  # fmt: skip
    stock, ours = (json.loads(line) for line in out.read_text().splitlines())
    assert stock["acc"] == ours["acc"] == 1.0
    assert 0 < ours["mean_difference_nats"] < 1
