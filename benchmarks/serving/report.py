"""Rows of results as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .sides import RAW, STOCK

Row = dict[str, Any]

METHOD = """\
Servers side by side get the same slices of requests in turn: stock SGLang (`torch_native`) and DeltaStore with {tiers}
pages; *at once*: requests that are asked together. All have the same bytes for KV (pages, page 0, frames, sinks; stock
counted in 16 bits, although its pool on a CPU takes 32). Budget: those bytes as a share of the workload's distinct
tokens in 16 bits. Prompts hold the recorded answers; greedy answers of {answer_tokens} tokens;
sessions in seeded random order ({seed}). {model}, float32, {machine}, {cores} cores, SGLang {sglang}, torch {torch},
commit {commit}. In brackets: times better than stock, than raw."""


def markdown(rows: Sequence[Row]) -> str:
    """One table for each benchmark there are rows of."""
    tables = {"serving": _served, "serving-offline": _offline, "sharing": _shared, "transcripts": _transcripts}
    parts = []
    for benchmark, table in tables.items():
        if chosen := [row for row in rows if row["benchmark"] == benchmark]:
            parts.append("\n".join(table(chosen)))
    return "\n\n".join(parts) + "\n"


def _served(rows: Sequence[Row]) -> Iterator[str]:
    yield _method(rows) + "\n"
    yield from _table([_cells(row, beside) for row, beside in _with_beside(rows)])


def summary(rows: Sequence[Row]) -> str:
    """Served workloads without the columns that the page of all results can do without."""
    left_out = ("budget", "evicted tokens", "retracted", "peak RSS, GB")
    cells = (_cells(row, beside) for row, beside in _with_beside(rows))
    lines = _table([{name: cell for name, cell in own.items() if name not in left_out} for own in cells])
    return "\n".join(lines) + "\n"


def _cells(row: Row, beside: dict[str, Row]) -> dict[str, str]:
    """A served side's line by column."""
    return {
        "workload": row["workload"],
        "budget": f"{row['budget_share']:g}",
        "at once": f"{row['concurrency']}",
        "side": f"`{row['side']}`",
        "TTFT p50, s": f"{row['ttft_p50_ms'] / 1000:.2f}{_less(row, beside, 'ttft_p50_ms')}",
        "TTFT p99, s": f"{row['ttft_p99_ms'] / 1000:.2f}",
        "output tokens/s": f"{row['output_tokens_per_s']:.2f}{_more(row, beside, 'output_tokens_per_s')}",
        "prompt tokens computed": f"{row['computed_tokens']:,}{_less(row, beside, 'computed_tokens')}",
        "cached": f"{row['cached_tokens'] / row['prompt_tokens']:.0%}",
        "evicted tokens": f"{row['evicted_tokens']:,}",
        "retracted": f"{row['retracted_requests']}",
        "peak RSS, GB": f"{row['peak_rss_bytes'] / 1e9:.2f}",
    }


def _table(lines: Sequence[dict[str, str]]) -> Iterator[str]:
    """Cells by column, as Markdown."""
    yield f"| {' | '.join(lines[0])} |"
    yield "|---" * len(lines[0]) + "|"
    for cells in lines:
        yield f"| {' | '.join(cells.values())} |"


def latency(rows: Sequence[Row]) -> str:
    """Rows of `latency`, a line for each metric and context, a column for each side."""
    sides = dict.fromkeys(row["side"] for row in rows)
    found = {(row["metric"], row["context_tokens"], row["side"]): row["median"] for row in rows}
    lines = []
    for metric, context in dict.fromkeys(key[:2] for key in found):
        stock = found[metric, context, STOCK]
        cells = {"metric": metric, "context": f"{context:,}"} | {f"`{side}`": "" for side in sides}
        for side in sides:
            if own := found.get((metric, context, side)):
                times = own / stock if metric.endswith("tokens/s") else stock / own
                cells[f"`{side}`"] = (f"{own:,.0f}" if own >= 100 else f"{own:.1f}") + _times(side, times)
        lines.append(cells)
    return "\n".join(_table(lines)) + "\n"


def budgets(rows: Sequence[Row]) -> str:
    """TTFT p50 of served workloads, a line for each budget, a column for each side."""
    lines = {}
    for row, beside in _with_beside(rows):
        cells = lines.setdefault(run_of(row), {"workload": row["workload"], "budget": f"{row['budget_share']:g}"})
        own, stock = row["ttft_p50_ms"], beside[STOCK]["ttft_p50_ms"]
        cells[f"`{row['side']}`"] = f"{own / 1000:.2f}" + _times(row["side"], stock / own)
    return "\n".join(_table(list(lines.values()))) + "\n"


def _times(side: str, times: float) -> str:
    """How many times better than stock."""
    return "" if side == STOCK else f" ({times:.2f}x)"


def _offline(rows: Sequence[Row]) -> Iterator[str]:
    yield "Offline, `sglang.Engine`: " + _method(rows) + "\n"
    yield (
        "| workload | budget | at once | side | output tokens/s | prompt and output tokens/s | prompt tokens computed |"
    )
    yield "|---|---|---|---|---|---|---|"
    for row, beside in _with_beside(rows):
        cells = [
            row["workload"],
            f"{row['budget_share']:g}",
            f"{row['concurrency']}",
            f"`{row['side']}`",
            f"{row['output_tokens_per_s']:.2f}{_more(row, beside, 'output_tokens_per_s')}",
            f"{row['tokens_per_s']:.0f}{_more(row, beside, 'tokens_per_s')}",
            f"{row['computed_tokens']:,}{_less(row, beside, 'computed_tokens')}",
        ]
        yield f"| {' | '.join(cells)} |"


def _shared(rows: Sequence[Row]) -> Iterator[str]:
    first = rows[0]
    yield (
        f"{first['users']} users of {first['context_tokens']} tokens, each a real request through the tree of a server "
        f"with `{first['tier']}`; bytes of pages, sinks and frames in use from `/deltastore/stats`, tokens counted "
        f"once more from the prompts' ids. {first['model']}, commit {first['commit']}.\n"
    )
    yield (
        "| prefix shared | stored, MB | fp16, nothing shared, MB | times less (published) | fp16, stock's tree, MB "
        "| times less |"
    )
    yield "|---|---|---|---|---|---|"
    for row in rows:
        yield (
            f"| {row['prefix_share']:.0%} | {row['stored_bytes'] / 1e6:.1f} | {row['fp16_unshared_bytes'] / 1e6:.1f} "
            f"| {row['times_unshared_fp16']:.1f} ({row['published_times']:g}) | {row['fp16_shared_bytes'] / 1e6:.1f} "
            f"| {row['times_shared_fp16']:.2f} |"
        )


def _transcripts(rows: Sequence[Row]) -> Iterator[str]:
    yield (
        "Recorded conversations: prompt tokens of all requests over the contexts they end up in (what turns and "
        "repeats add), those over the tree (what sessions and branches share), and bytes as above.\n"
    )
    yield (
        "| transcripts | requests | turns and repeats | across contexts | times less than fp16, each request's prompt "
        "by itself | than fp16, each context by itself | than stock's tree |"
    )
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        yield (
            f"| {row['workload']} | {row['requests']} | {row['temporal']:.2f} | {row['across']:.2f} "
            f"| {row['times_every_prompt_fp16']:.1f} | {row['times_unshared_fp16']:.1f} "
            f"| {row['times_shared_fp16']:.2f} |"
        )


def _method(rows: Sequence[Row]) -> str:
    row = rows[0]
    ours = dict.fromkeys(f"`{row['side']}`" for row in rows if row["side"] != STOCK)
    return METHOD.format(
        tiers=", ".join(ours),
        answer_tokens=row["sizes"]["answer_tokens"],
        seed=f"seed {row['seed']}",
        model=row["model"],
        machine=row["machine"],
        cores=row["cores"],
        sglang=row["versions"]["sglang"],
        torch=row["versions"]["torch"],
        commit=row["commit"],
    )


def _with_beside(rows: Sequence[Row]) -> Iterator[tuple[Row, dict[str, Row]]]:
    """Each row with the rows of its run by side."""
    for row in rows:
        yield row, {other["side"]: other for other in rows if run_of(other) == run_of(row)}


def run_of(row: Row) -> tuple[str, float, int]:
    """What the sides of one comparison have in common."""
    return row["workload"], row["budget_share"], row["concurrency"]


def _less(row: Row, beside: dict[str, Row], name: str) -> str:
    return _compared(row, beside, lambda own, other: other[name] / own[name])


def _more(row: Row, beside: dict[str, Row], name: str) -> str:
    return _compared(row, beside, lambda own, other: own[name] / other[name])


def _compared(row: Row, beside: dict[str, Row], better: Any) -> str:
    others = [name for name in (STOCK, RAW) if name != row["side"] and row["side"] != STOCK and name in beside]
    return f" ({', '.join(f'{better(row, beside[name]):.2f}x' for name in others)})" if others else ""
