"""The published tables are the ones that the published figures make; the benchmark runs on small traces."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from benchmarks.fleet import results
from benchmarks.provenance import ROOT

PUBLISHED = ROOT / "benchmarks/results"


def test_the_tables_are_made_from_the_figures() -> None:
    assert results.markdown(json.loads((PUBLISHED / "fleet.json").read_text())) == (PUBLISHED / "fleet.md").read_text()


def test_the_published_figures_hold_together() -> None:
    for trace in json.loads((PUBLISHED / "fleet.json").read_text())["traces"]:
        hits = trace["hits"]
        by_capacity = sorted((row["capacity_tokens"], row["hit_rate"]) for row in hits["rows"])
        rates = [rate for _, rate in by_capacity]
        assert all(later >= earlier - 0.001 for earlier, later in itertools.pairwise(rates))
        assert max(rates) <= hits["endless"]["hit_rate"]
        assert all(row["prompt_tokens"] == row["hit_tokens"] + row["computed_tokens"] for row in hits["rows"])
        assert hits["skipped_lines"] == 0
        sharing = hits["sharing"]
        assert sharing["factor"] == pytest.approx(sharing["temporal"] * sharing["across"])


def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    lines = [
        {"timestamp": 1000 * i, "input_length": 1024, "output_length": 3, "hash_ids": [i % 2, 10 + i % 4]}
        for i in range(40)
    ]
    (tmp_path / "mooncake").mkdir()
    (tmp_path / "mooncake/conversation_trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(results, "SOURCES", results.SOURCES[:1])
    monkeypatch.setattr("sys.argv", ["results", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    results.main()
    written = json.loads((tmp_path / "out/fleet.json").read_text())
    (trace,) = written["traces"]
    # 4 prompts of two blocks over 6 different blocks; all but the first of each hits all but its last page
    assert trace["hits"]["endless"]["hit_tokens"] == 2 * 512 + 36 * (1024 - 16)
    assert set(trace["groups_needed"].values()) == {1}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "fleet.json", "fleet.md", "fleet-mooncake-conversation.svg"}  # fmt: skip
    with pytest.raises(SystemExit, match="0 files match"):
        results.find(tmp_path, "azure/*")
