"""The picture of a run: for each workload and budget, the sides beside one another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .report import Row, run_of

_COLOURS = ("#8a8f98", "#5b6c8f", "#0b6e4f", "#c9822b", "#8c4a6b")
#: column, label, what a unit of the axis is in the column's
_PANELS = (
    ("ttft_p50_ms", "time to first token, p50 (tip: p99), s", 1000),
    ("computed_tokens", "prompt tokens computed, thousands", 1000),
    ("output_tokens_per_s", "output tokens/s", 1),
)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG or SVG. Raises ValueError where there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = [row for row in rows if row["benchmark"] == "serving"]
    if not chosen:
        raise ValueError("--plot: only rows of served workloads are drawn; leave it out, or add such a --workload")
    runs = list(dict.fromkeys(map(run_of, chosen)))
    sides = list(dict.fromkeys(row["side"] for row in chosen))
    found = {(*run_of(row), row["side"]): row for row in chosen}
    width = 0.78 / len(sides)
    figure, panels = pyplot.subplots(
        len(_PANELS), 1, figsize=(max(6, 2 + 1.5 * len(runs)), 9), facecolor="white", layout="constrained"
    )
    try:
        for panel, (name, label, unit) in zip(panels, _PANELS, strict=True):
            for number, side in enumerate(sides):
                own = [(place, found[*run, side]) for place, run in enumerate(runs) if (*run, side) in found]
                places = [place + (number - (len(sides) - 1) / 2) * width for place, _ in own]
                tips = None
                if name == "ttft_p50_ms":
                    tips = [[0.0] * len(own), [(row["ttft_p99_ms"] - row["ttft_p50_ms"]) / unit for _, row in own]]
                panel.bar(
                    places, [row[name] / unit for _, row in own], 0.92 * width, label=side, yerr=tips, ecolor="#444444",
                    color=_COLOURS[number % len(_COLOURS)], error_kw={"linewidth": 0.8},
                )  # fmt: skip
            panel.set_ylabel(label)
            labels = [f"{workload}, {at_once} at once\n{share:g} of working set" for workload, share, at_once in runs]
            panel.set_xticks(range(len(runs)), labels)
            panel.grid(True, axis="y", color="#dddddd", linewidth=0.8)
            panel.set_axisbelow(True)
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].legend(frameon=False, ncols=len(sides), loc="lower right", bbox_to_anchor=(1, 1))
        figure.savefig(path, dpi=130)
    finally:
        pyplot.close(figure)
