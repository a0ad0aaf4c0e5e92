"""One table of fields: whatever shows facts shows fields of it, and says of them what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_deltastore import cli
from sglang_deltastore.observe import history, series
from sglang_deltastore.observe.dashboard import page
from sglang_deltastore.observe.stats import CanaryPart, NodeStats, StoreStats, table
from sglang_deltastore.seam import facts
from tests.observe.test_stats import scheduler

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "sglang_deltastore" / "observe" / "dashboard" / "page.js"
BOARD = ROOT / "docker" / "grafana-dashboard.json"

UNITS = {"_bytes": "bytes", "_tokens": "tokens", "_seconds": "s", "_s": "s"}


@pytest.mark.parametrize("of", [StoreStats, NodeStats, CanaryPart])
def test_every_field_says_what_it_is(of: type) -> None:
    for name, fact in table(of).items():
        assert fact.help, name
        for ending, unit in UNITS.items():
            if name.endswith(ending) and not name.startswith("times_"):
                assert fact.unit == unit, f"{name} is in {fact.unit!r}"
        assert fact.series in ("", "gauge", "counter"), name
        assert bool(fact.label) == bool(fact.name), name


def names_in(script: str, of: str) -> set[str]:
    return set(re.findall(rf"\b{of}\.(\w+)", script))


def test_the_page_shows_fields_that_there_are() -> None:
    script = SCRIPT.read_text()
    assert len(names_in(script, "stats")) > 25
    assert names_in(script, "stats") <= set(table())
    # below: the page's own, of a node and those after it
    assert len(names_in(script, "node")) > 8
    assert names_in(script, "node") - {"below", "setAttribute", "append"} <= set(table(NodeStats))
    assert names_in(script, "past") - {"time_s"} <= set(history.SAMPLED) <= set(table())
    kinds = re.search(r"\[(.*?)\]\.map\(\(kind, at\)", script)
    assert kinds is not None
    assert re.findall(r'"(\w+)"', kinds[1]) == list(series.LABELLED["resident_bytes"].values())
    for name, fact in table().items():
        assert f'<th scope="row">{name}</th><td>{fact.unit}</td>' in page()


def test_grafana_shows_series_that_there_are_and_says_what_they_mean() -> None:
    """To write the descriptions anew: python -m sglang_deltastore.observe.series docker/grafana-dashboard.json"""
    for panel in json.loads(BOARD.read_text())["panels"]:
        expressions = [target["expr"] for target in panel["targets"]]
        assert all(series.shown_in([expression]) for expression in expressions), panel["title"]
        assert panel["description"] == series.description(expressions), panel["title"]


def test_a_board_that_shows_something_else_is_found() -> None:
    assert series.shown_in(["rate(deltastore:hit_tokens_total{a='b'}[1m]) / deltastore:ratio"]) == [
        "hit_tokens",
        "ratio",
    ]
    with pytest.raises(KeyError, match="encode_seconds"):
        series.description(["rate(deltastore:encode_seconds_total[1m])"])


class Recorded:
    """A metric as prometheus_client makes them."""

    def __init__(self, values: dict[str, float], name: str, labels: tuple[str, ...]) -> None:
        self.values, self.name, self.names = values, name, labels

    def labels(self, **labels: str) -> Any:
        assert set(labels) == set(self.names)
        key = ",".join([self.name, *(labels[name] for name in ("state", "kind", "memory") if name in labels)])
        return SimpleNamespace(
            set=lambda value: self.values.__setitem__(key, value),
            inc=lambda value: self.values.__setitem__(key, self.values.get(key, 0) + value),
        )


def test_every_series_of_the_table_is_served() -> None:
    values: dict[str, float] = {}

    def make(name: str, _help: str, labels: tuple[str, ...], **_mode: str) -> Recorded:
        return Recorded(values, name, labels)

    served, stats = series.Series(make, make, {"tier": "k4v2"}), facts.LiveFacts(scheduler()).fresh()
    for _ in range(2):  # counters count on from what they were
        served.update(stats)
    expected: dict[str, float] = {}
    to_name: dict[str, Callable[[str], str]] = {
        "gauge": lambda name: f"deltastore:{name}", "counter": lambda name: f"deltastore:{name}_total"
    }  # fmt: skip
    for name, fact in table().items():
        if fact.series:
            series_name = to_name[fact.series](fact.name or name)
            expected[",".join([series_name, *([fact.label[1]] if fact.label else [])])] = getattr(stats, name)
    assert values == expected
    assert {"deltastore:pages,free", "deltastore:requests_total", "deltastore:dedup"} <= set(values)


def test_the_terminal_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", "--fields"]) == 0
    shown = capsys.readouterr().out
    for name in (*table(), *table(NodeStats), *table(CanaryPart)):
        assert f" {name} " in shown
