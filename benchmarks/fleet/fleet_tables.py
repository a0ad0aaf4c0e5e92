"""The documents' tables of replayed traces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import fmean

from benchmarks.provenance import RESULTS
from benchmarks.rows import Row, table

_FLEET_TRACES = ("mooncake-conversation", "claude-code")
_FLEET_BUDGETS = ("1M", "4M")
_ASKED_SIZES = (0.5, 1.0, 2.0, 4.0)


def fleet() -> str:
    """Hit rates, and in brackets prompt tokens computed, of the traces and budgets that say most."""
    result = json.loads((RESULTS / "fleet.json").read_text())
    lines = []
    for trace in result["traces"]:
        if trace["name"] in _FLEET_TRACES:
            found = {(row["budget"], row["tier"]): row for row in trace["hits"]["rows"]}
            kinds = dict.fromkeys(kind for _, kind in found)
            for budget in _FLEET_BUDGETS:
                cells = {"trace": trace["title"], "KV memory, fp16 tokens": budget}
                for kind in kinds:
                    row = found[budget, kind]
                    cells[kind] = f"{row['hit_rate']:.1%} ({row['computed_tokens'] / 1e6:,.1f} M)"
                lines.append(cells)
    return table(lines)


def hit_curve(rows: Sequence[Row]) -> str:
    """A line for each present size: what the replay finds at each size, and how many points the live curve is off."""
    rows, lines = [row for row in rows if row["benchmark"] == "hit-curve"], []
    for source, capacity_tokens in dict.fromkeys((row["source"], row["capacity_tokens"]) for row in rows):
        sizes = [row for row in rows if (row["source"], row["capacity_tokens"]) == (source, capacity_tokens)]
        asked = [row for row in sizes if row["memory"] in _ASKED_SIZES]
        worst = max((row["recent_worst_off"] for row in asked), key=abs)
        lines.append(
            {
                "requests of": source,
                "present memory, tokens": f"{capacity_tokens:,}",
                "sampled pages": f"{sizes[0]['sampled_share']:.1%}",
                **{f"{row['memory']:g}x": _off(row) for row in sizes},
                "worst in recent requests, 0.5x to 4x": f"{100 * worst:+.2f}",
            }
        )
    return table(lines)


def hit_curve_cost(rows: Sequence[Row]) -> str:
    parts = {"page keys": "keys_ms", "looked up": "asked_ms", "taken in": "used_ms", "used again": "used_again_ms"}
    return table(
        [
            {
                "memory, tokens": f"{row['capacity_tokens']:,}",
                "sampled pages": f"{row['sampled_share']:.1%}",
                **{f"{name}, ms": f"{row[field]:.2f}" for name, field in parts.items()},
                "a request in all, ms": f"{row['request_ms']:.2f}",
            }
            for row in rows
            if row["benchmark"] == "hit-curve-cost"
        ]
    )


def hit_curve_served(rows: Sequence[Row]) -> str:
    lines = []
    for clients in dict.fromkeys(row["clients"] for row in rows):
        sizes = [row for row in rows if row["clients"] == clients]
        lines.append(
            {
                "clients": str(clients),
                "found by the server": f"{sizes[0]['served_hit_rate']:.1%}",
                **{f"{row['memory']:g}x": _off(row) for row in sizes},
            }
        )
    return table(lines)


def _off(row: Row) -> str:
    off = row["live_hit_rate"] - row["replay_hit_rate"]
    return f"{row['replay_hit_rate']:.1%} ({100 * off:+.2f})"


def precision(rows: Sequence[Row]) -> str:
    """Second halves of traces where `lossless` evicts: hit rate, bits of a value hit, expected KL of it."""
    judged = [row for row in rows if row["half"] == 2 and row["budget"] != "mean"]
    order = next(row["policy"] for row in judged if row["tier"] == "lossless")
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in judged:
        if row["policy"] == order and row["tier"] == "lossless" and row["evicted_pages"]:
            lines[row["trace"], row["budget"]] = {"trace": row["trace"], "KV memory, fp16 tokens": row["budget"]}
    for row in judged:
        line = lines.get((row["trace"], row["budget"]))
        if line and (row["chosen"] or (row["policy"] == order and "adaptive" not in row["tier"])):
            line[f"`{row['tier']}`"] = f"{row['hit_rate']:.1%}, {row['hit_bits']:.2f}, {row['hit_kl']:.4f}"
    return table(list(lines.values()))


def precision_policies(rows: Sequence[Row]) -> str:
    """Means over traces and budgets, of the half that chose and of the one that judged: hit rate, expected KL of hits,
    expected KL of whole prompts."""
    means: dict[tuple[str, str], dict[int, list[Row]]] = {}
    for row in rows:
        if row["budget"] == "mean":
            means.setdefault((row["tier"], row["policy"]), {}).setdefault(row["half"], []).append(row)
    lines = []
    for (tier_name, policy), halves in means.items():
        if 2 not in halves:
            continue
        mark = "**" if halves[2][0]["chosen"] else ""
        line = {"tier": f"`{tier_name}`", "policy": f"{mark}{policy}{mark}"}
        for half, name in ((1, "chose"), (2, "judged")):
            same = halves.get(half, [])
            cells = [fmean(row[field] for row in same) for field in ("hit_rate", "hit_kl", "prompt_kl") if same]
            line[name] = f"{cells[0]:.2%}, {cells[1]:.4f}, {cells[2]:.4f}" if cells else ""
        lines.append(line)
    return table(lines)
