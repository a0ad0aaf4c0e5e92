"""Pictures with matplotlib, which nothing else of the fleet needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from .kv import KvTier
from .planner import DoesNotFit, Fleet, plans

FORMATS = (".png", ".svg")
USERS = tuple(round(10 ** (2 + step / 4)) for step in range(13))
"""100 to 100,000, four to a decade."""

MARKERS = "osD^vPX*"


def cost_against_users(fleet: Fleet, tiers: Sequence[KvTier], path: Path) -> None:
    """One line for each tier, both axes logarithmic."""
    figure, axes = _figure(path)
    lines: dict[str, list[tuple[int, float]]] = {}
    for users in USERS:
        try:
            found = plans(fleet.with_users(users), tiers)
        except DoesNotFit:
            continue
        for result in found:
            lines.setdefault(result.tier, []).append((users, result.cost_usd_per_year))
    for marker, (tier, points) in zip(MARKERS, lines.items(), strict=False):
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=tier)
    axes.set(xscale="log", yscale="log", xlabel="users", ylabel=f"US\\$ a year at \\${fleet.gpu.price_usd_per_h:g}/h")
    axes.set_title(f"{fleet.model.name} on {fleet.gpu.name}, {fleet.workload.context_tokens:,} tokens a user")
    _save(figure, axes, path)


def hit_rate_against_budget(title: str, rates: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """rates: tier -> (budget in millions of fp16 tokens, hit rate)."""
    figure, axes = _figure(path)
    for marker, (tier, points) in zip(MARKERS, rates.items(), strict=False):
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=tier)
    axes.set(xlabel="KV memory, in millions of fp16 tokens", ylabel="share of prompt tokens that hit", title=title)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylim(bottom=0)
    _save(figure, axes, path)


def _figure(path: Path) -> tuple[Any, Any]:
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: a picture is written as {' or '.join(FORMATS)}")
    figure = Figure(figsize=(8, 5), layout="constrained")
    return figure, figure.add_subplot()


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize="small")
    with matplotlib.rc_context({"svg.hashsalt": "deltastore", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
