"""Prometheus series, from the table of facts."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .canary import Answer
from .stats import Fact, StoreStats, table

PREFIX = "deltastore:"

_LABELLED = {
    "pages": "Pages by state.",
    "resident_bytes": "Allocated bytes by kind.",
    "hit_rate": "Share of recent prompts' tokens found stored, by KV memory in times of the present.",
}
"""Help of series that several fields make."""


def _of_kind(kind: str) -> dict[str, Fact]:
    return {name: fact for name, fact in table().items() if fact.series == kind}


#: field -> help, of gauges and of counters; a counter's series is called FIELD_total
GAUGES = {name: fact.help for name, fact in _of_kind("gauge").items() if fact.label is None}
COUNTERS = {name: fact.help for name, fact in _of_kind("counter").items()}

#: series -> field -> value of its label
LABELLED = {
    series: {name: fact.label[1] for name, fact in table().items() if fact.label and fact.name == series}
    for series in _LABELLED
}


CANARY_KL = "canary_kl_nats"
_CANARY_KL_HELP = (
    "KL(raw || served) of compared tokens, in nats, by their context's tokens and the share that was a hit."
)
_CANARY_KL_BOUNDS = (1e-5, 1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


class CanaryHistogram:
    """A listener of the canary. histogram: makes one as prometheus_client does; labels: those of all series."""

    def __init__(self, histogram: Callable[..., Any], labels: dict[str, str]) -> None:
        names = (*labels, "context", "hit")
        self._labels = labels
        self._histogram = histogram(PREFIX + CANARY_KL, _CANARY_KL_HELP, names, buckets=_CANARY_KL_BOUNDS)

    def __call__(self, answer: Answer, kl: list[float]) -> None:
        child = self._histogram.labels(**self._labels, context=answer.by_context, hit=answer.by_hit)
        for nats in kl:
            child.observe(nats)


class Series:
    """The series of one store. gauge, counter: make one as prometheus_client does; labels: those of all series."""

    def __init__(self, counter: Callable[..., Any], gauge: Callable[..., Any], labels: dict[str, str]) -> None:
        self._labels, names = labels, tuple(labels)
        self._counted = dict.fromkeys(COUNTERS, 0.0)
        self._counters = {
            field: counter(f"{PREFIX}{field}_total", help_text, names) for field, help_text in COUNTERS.items()
        }

        def make_gauge(name: str, help_text: str, *more_labels: str) -> Any:
            return gauge(PREFIX + name, help_text, (*names, *more_labels), multiprocess_mode="mostrecent")

        self._gauges = {field: make_gauge(field, help_text) for field, help_text in GAUGES.items()}
        self._labelled = {
            series: make_gauge(series, help_text, _label_of(series)) for series, help_text in _LABELLED.items()
        }

    def update(self, stats: StoreStats) -> None:
        for field, gauge in self._gauges.items():
            gauge.labels(**self._labels).set(getattr(stats, field))
        for field, counter in self._counters.items():
            value = getattr(stats, field)
            counter.labels(**self._labels).inc(value - self._counted[field])
            self._counted[field] = value
        for series, gauge in self._labelled.items():
            for field, value in LABELLED[series].items():
                gauge.labels(**self._labels, **{_label_of(series): value}).set(getattr(stats, field))


def _label_of(series: str) -> str:
    return next(fact.label[0] for fact in table().values() if fact.label and fact.name == series)


def shown_in(expressions: list[str]) -> list[str]:
    """Names of our series, without prefix and endings, in PromQL expressions."""
    found = [name for expression in expressions for name in re.findall(rf"{PREFIX}(\w+)", expression)]
    return list(dict.fromkeys(re.sub("_(total|bucket|sum|count)$", "", name) for name in found))


def description(expressions: list[str]) -> str:
    """What a Grafana panel says of the series in its expressions. Raises KeyError for one that there is not."""
    known = {**GAUGES, **COUNTERS, **_LABELLED, CANARY_KL: _CANARY_KL_HELP}
    lines = []
    for name in shown_in(expressions):
        lines.append(f"{name}: {known[name]}")
        for field, value in LABELLED.get(name, {}).items():
            lines.append(f"- {value}: {table()[field].help}")
    return "\n".join(lines)


def describe_board(path: Path) -> None:
    """Write the descriptions of a Grafana dashboard's panels anew."""
    board = json.loads(path.read_text(encoding="utf-8"))
    for panel in board["panels"]:
        panel["description"] = description([target["expr"] for target in panel["targets"]])
    path.write_text(json.dumps(board, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    describe_board(Path(sys.argv[1]))
