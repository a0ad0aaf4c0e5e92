"""What the documents' tables are made with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.provenance import RESULTS

Row = dict[str, Any]


def rows_of(name: str) -> list[Row]:
    """The rows of benchmarks/results/NAME.jsonl."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def table(lines: Sequence[dict[str, str]]) -> str:
    """Cells by column, as Markdown. Every line has the same columns."""
    assert all(line.keys() == lines[0].keys() for line in lines)
    head = [f"| {' | '.join(lines[0])} |", "|---" * len(lines[0]) + "|"]
    return "\n".join(head + [f"| {' | '.join(cells.values())} |" for cells in lines]) + "\n"


def of_rows(name: str, render: Callable[[Sequence[Row]], str]) -> Callable[[], str]:
    """A table that needs one file of rows and nothing else."""
    return lambda: render(rows_of(name))


def origin(rows: Iterable[Row]) -> str:
    """Machine and commit of rows that come from one run; raises ValueError where they come from several."""
    found = {f"{row['machine']}, {row['cores']} cores, {row['commit']}" for row in rows}
    if len(found) != 1:
        raise ValueError(f"rows of several runs: {sorted(found)}; a figure needs rows of one")
    return found.pop()


def nats(row: Row, *names: str) -> str:
    """Its figures NAME_nats, with a comma between."""
    return ", ".join(f"{row[f'{name}_nats']:.1g}" for name in names)
