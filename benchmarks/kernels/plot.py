"""Decode time against context, from the rows of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

HEAD_DIM, GQA = 128, 4


def context_plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Microseconds of one decode step against its context: our formats, baselines and the fp16 read, one
    thread, batch 1, both axes logarithmic."""
    matplotlib.use("Agg")
    chosen = [
        row
        for row in rows
        if (row["op"], row["head_dim"], row["gqa"], row["batch"], row["threads"])
        == ("attend_decode", HEAD_DIM, GQA, 1, 1)
    ]
    best_isa = chosen[0]["isa"]
    lines: dict[str, dict[int, float]] = {}
    for row in chosen:
        if row["isa"] != best_isa:
            continue
        context = row["context"]
        lines.setdefault(row["format"], {})[context] = row["us"]
        lines.setdefault("merely reading fp16 KV", {})[context] = row["fp16_read_us"]
        for name, value in row["baselines_us"].items():
            lines.setdefault(name.replace("_", " "), {})[context] = value
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, points in lines.items():
        style = "-" if name.startswith("K") else ":" if name.startswith("merely") else "--"
        axes.loglog(sorted(points), [points[context] for context in sorted(points)], style, marker="o", label=name)
    axes.set(xlabel="context, tokens", ylabel="one decode step of one layer, us")
    axes.set_title(f"head_dim {HEAD_DIM}, 8 KV heads, GQA {GQA}, one thread, {best_isa}, {chosen[0]['machine']}")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
