"""The study of precision by need: agents become traces, halves are halves, the choice is what its rule says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fleet import agents, precision
from benchmarks.serving.workloads import Request
from sglang_deltastore.fleet.traces import Trace
from sglang_deltastore.policy.precision import SGLANGS, Policy, frequency, recency, sharing

PUBLISHED = precision.RESULTS / "precision.jsonl"


def test_agents_become_a_trace_in_which_equal_beginnings_are_equal(tmp_path: Path) -> None:
    system = list(range(40))
    prompts = [system, [*system, *range(100, 120)], [*range(200, 216), *system[16:]]]
    path = tmp_path / "agents.jsonl"
    path.write_text(agents.trace([Request(0, prompt, 5) for prompt in prompts]))
    requests = list(Trace(path))
    blocks = [memoryview(request.blocks).cast("q").tolist() for request in requests]
    assert blocks == [[0, 1], [0, 1, 2], [3, 4]]
    assert [(each.time_s, each.prompt_tokens, each.answer_tokens) for each in requests] == [
        (0.0, 40, 5), (1.0, 60, 5), (2.0, 40, 5)]  # fmt: skip


LOSSES = {"lossless": 1.0, "k4v2": 2.0, "conservative": 4.0, "k2v2": 8.0}


def mooncake(folder: Path, ids: list[list[int]]) -> None:
    lines = [
        {"timestamp": 1000 * at, "input_length": 512 * len(each), "output_length": 1, "hash_ids": each}
        for at, each in enumerate(ids)
    ]
    (folder / "mooncake").mkdir()
    (folder / "mooncake/conversation_trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_study_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten blocks again and again in the first half, twenty in the second; budgets for 5.4 and 450 of them in fp16."""
    mooncake(tmp_path, [[at % 10, 10 + at % 10] for at in range(40)] + [[at % 20, 50 + at % 20] for at in range(40)])
    source = precision.Source("mooncake-conversation", "Mooncake", ("2800", "230k"), "mooncake/conversation*")
    monkeypatch.setattr(precision, "SOURCES", (source,))
    monkeypatch.setattr(precision, "CANDIDATES", (Policy(), Policy(frequency), Policy(sharing, 0.25)))
    monkeypatch.setattr(precision, "level_kl", lambda: LOSSES)
    monkeypatch.setattr(precision, "RANKS", {rank.__name__: rank for rank in (recency, frequency, sharing)})
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr("sys.argv", ["precision", "--data", str(tmp_path), "--model", "none", "--out", str(out)])
    precision.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    judged = {(row["budget"], row["tier"]): row for row in rows if row["half"] == 2 and row["policy"][0] != "f"}
    assert {row["requests"] for row in rows if row["budget"] != "mean"} == {40}
    # Half of the second half comes again, and all but the last page of each hits.
    assert judged["230k", "lossless"]["hit_rate"] == pytest.approx(20 * (1024 - 16) / (40 * 1024))
    for tier in precision.ADAPTIVE:
        same = ("hit_rate", "hit_bits", "worst_hit_bits", "hit_kl", "prompt_kl", "evicted_pages", "demoted_pages")
        assert [judged["230k", tier][name] for name in same] == [judged["230k", "lossless"][name] for name in same]
        assert len({row["policy"] for row in rows if row["chosen"] and row["tier"] == tier}) == 1
    assert judged["2800", "adaptive"]["demoted_pages"] > 0
    assert judged["230k", "k2v2"]["hit_kl"] == LOSSES["k2v2"]


def rows_of(policy: Policy, hit_rate: float, hit_kl: float, tier: str = "adaptive") -> list[dict[str, Any]]:
    """Two traces, a hit more in one than in the other."""
    told = {"half": 1, "tier": tier, "policy": precision.told(policy), "budget": "1M", "hit_bits": 1, "prompt_kl": 1}
    return [told | {"trace": str(off), "hit_rate": hit_rate + off, "hit_kl": hit_kl} for off in (-0.1, 0.1)]


def test_the_choice_is_the_least_loss_among_those_that_hit_enough() -> None:
    fixed = rows_of(SGLANGS, 0.5, 4.0, "conservative")
    few, fine, coarse = Policy(sharing, 0.5), Policy(frequency, 0.25), Policy()
    rows = [*fixed, *rows_of(few, 0.49, 1.0), *rows_of(fine, 0.5, 2.0), *rows_of(coarse, 0.6, 3.0)]
    assert precision.choose(rows, "adaptive", [few, fine, coarse]) == fine
    assert precision.choose(rows, "adaptive", [few, coarse]) == coarse
    assert precision.choose(rows, "adaptive", [few]) == few


def test_losses_are_the_published_ones_and_grow_downwards() -> None:
    losses = list(precision.level_kl().values())
    assert losses == sorted(losses) and 0.003 < losses[0] < 0.006


def test_the_published_rows_hold_together() -> None:
    rows = [json.loads(line) for line in PUBLISHED.read_text().splitlines()]
    losses = precision.level_kl()
    for row in rows:
        floor = {"adaptive": "conservative", "adaptive-k2v2": "k2v2"}.get(row["tier"], row["tier"])
        finest = "lossless" if "adaptive" in row["tier"] else row["tier"]
        for name in ("hit_kl", "prompt_kl"):
            assert losses[finest] - 1e-9 <= row[name] <= losses[floor] + 1e-9
        if row["budget"] != "mean":
            assert row["worst_hit_bits"] <= row["hit_bits"] + 1e-9
            assert row["computed_tokens"] == round((1 - row["hit_rate"]) * row["prompt_tokens"])
    chosen = {(row["tier"], row["policy"]) for row in rows if row["chosen"]}
    assert len(chosen) == len(precision.ADAPTIVE)
