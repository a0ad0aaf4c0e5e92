"""The Pareto picture: mean KL against ratio, ours and others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: source -> marker, colour
_MARKS = {"ours": ("o", "#0b6e4f"), "published": ("s", "#c1440e"), "peer": ("^", "#5b6c8f")}
_LEAST_KL = 1e-5


def pareto(rows: list[dict[str, Any]], title: str, path: Path, by: str = "protocol") -> None:
    """Draw rows of `deltastore quality` into a PNG: one panel for each value of `by`, lower right is better."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    values = sorted({row[by] for row in rows})
    figure, panels = pyplot.subplots(
        len(values), 1, figsize=(9, 6.2 * len(values)), squeeze=False, facecolor="white", layout="constrained"
    )
    try:
        for panel, value in zip(panels[:, 0], values, strict=True):
            _draw(panel, [row for row in rows if row[by] == value and row["kl_mean"] > _LEAST_KL])
            panel.set_title(f"{title}, {by} {value!r}", loc="left", fontsize=11)
        figure.savefig(path, dpi=150)
    finally:
        pyplot.close(figure)


def _draw(panel: Any, rows: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import LogLocator

    rows = list({(row["source"], row["config"]): row for row in rows}.values())  # suites share rows
    for source, (marker, colour) in _MARKS.items():
        points = [(row["ratio"], row["kl_mean"]) for row in rows if row["source"] == source]
        if points:
            panel.scatter(*zip(*points, strict=True), marker=marker, color=colour, s=46, label=source, zorder=3)
    ours = _front([(row["ratio"], row["kl_mean"]) for row in rows if row["source"] == "ours"])
    if len(ours) > 1:
        panel.plot(*zip(*ours, strict=True), color=_MARKS["ours"][1], linewidth=1.2, alpha=0.6, zorder=2)
    panel.set_yscale("log")
    panel.set_xlabel("ratio: bytes of 16-bit KV / all bytes that hold it")
    panel.set_ylabel("mean KL(original || compressed), nats")
    panel.grid(True, which="major", color="#dddddd", linewidth=0.8)
    panel.grid(True, which="minor", axis="y", color="#f0f0f0", linewidth=0.5)
    panel.spines[["top", "right"]].set_visible(False)
    for axis in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
        axis("{x:g}")
    panel.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    panel.tick_params(axis="y", which="minor", labelsize=7)
    low, high = panel.get_ylim()
    panel.set_ylim(low / 1.1, high * 1.25)
    left, right = panel.get_xlim()
    panel.set_xlim(left, right + 0.2 * (right - left))  # room for the last labels
    panel.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(_MARKS))
    _label(panel, rows)


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats on both axes, by ratio."""
    front: list[tuple[float, float]] = []
    for ratio, kl in sorted(points, key=lambda point: (-point[0], point[1])):
        if not front or kl < front[-1][1]:
            front.append((ratio, kl))
    return front[::-1]


def _label(panel: Any, rows: list[dict[str, Any]]) -> None:
    """Each point's config beside it; a label that would cover another or a point moves up or down by lines."""
    from matplotlib.transforms import Bbox

    panel.figure.canvas.draw()
    renderer = panel.figure.canvas.get_renderer()
    points = panel.transData.transform([(row["ratio"], row["kl_mean"]) for row in rows])
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in points]
    inside = panel.get_window_extent(renderer)
    for row in sorted(rows, key=lambda row: (row["source"] != "ours", row["ratio"])):
        for lines in (0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6):
            text = panel.annotate(
                row["config"], (row["ratio"], row["kl_mean"]), xytext=(7, 9 * lines - 3), textcoords="offset points",
                fontsize=7, color=_MARKS[row["source"]][1],
            )  # fmt: skip
            box = text.get_window_extent(renderer)
            if inside.y0 < box.y0 and box.y1 < inside.y1 and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()
