"""Families of models: what benchmarks.families promises of each, and what it finds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.families.shapes import FAMILIES
from benchmarks.rows import rows_of

ROOT = Path(__file__).resolve().parents[2]

#: dense, experts (whose code asks for the pool), windows and a soft cap, sinks, on Transformers, towers, refused
SOME = ("qwen2", "qwen3-moe", "gemma2", "gpt-oss", "smollm3", "qwen3-vl", "deepseek-v3")


def test_the_published_rows_are_of_every_family_and_as_promised() -> None:
    """A family that becomes served, or ceases to be, needs new rows: make results-models."""
    rows = {row["family"]: row for row in rows_of("models")}
    assert list(rows) == list(FAMILIES)
    assert {name: row["state"] for name, row in rows.items()} == {
        name: family.state for name, family in FAMILIES.items()
    }
    assert [name for name, row in rows.items() if FAMILIES[name].says not in row.get("message", "")] == []


@pytest.mark.slow
def test_some_families_are_as_promised(tmp_path: Path) -> None:
    rows_file = tmp_path / "rows"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.families", "--json", rows_file, *SOME],
        capture_output=True, text=True, timeout=900, check=False, cwd=ROOT,
    )  # fmt: skip
    rows = {(row := json.loads(line))["family"]: row["state"] for line in rows_file.read_text().splitlines()}
    assert rows == {name: FAMILIES[name].state for name in SOME}, done.stderr[-3000:]
    assert done.returncode == 0, done.stderr[-3000:]
