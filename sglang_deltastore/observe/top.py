"""`deltastore top`: a running server's store, live in the terminal."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

import msgspec
import requests
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .dashboard import STATS_PATH
from .series import LABELLED
from .stats import CanaryPart, NodeStats, StoreStats, table

_TIMEOUT_S = 30
_BAR_CELLS = 60
_NODES_SHOWN = 12
_COST_SHARE = 1 / 200  # of the scheduler's time, that a snapshot may take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="where the server is (default: %(default)s)")
    parser.add_argument(
        "--api-key", help="what opens the server: its --admin-api-key if it has one, else its --api-key"
    )
    parser.add_argument(
        "--replica", type=int, default=0, metavar="N", help="of --data-parallel-size, from 0 (default: %(default)s)"
    )
    parser.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--once", action="store_true", help="print one snapshot and end")
    parser.add_argument("--json", action="store_true", help="print snapshots as JSON, a line each")
    parser.add_argument("--fields", action="store_true", help="say what the fields of a snapshot mean, and end")


def run(args: argparse.Namespace) -> int:
    if args.fields:
        Console().print(_fields("a snapshot", StoreStats), _fields("an entry of nodes", NodeStats))
        Console().print(_fields("an entry of canary_by_hit and canary_by_context", CanaryPart))
        return 0
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}

    def ask() -> StoreStats:
        answer = requests.get(args.url.rstrip("/") + STATS_PATH, headers=headers, timeout=_TIMEOUT_S)
        answer.raise_for_status()
        snapshots = answer.json()
        if not 0 <= args.replica < len(snapshots):
            raise IndexError(f"--replica {args.replica}: the server has {len(snapshots)}; allowed is 0 to its last")
        return StoreStats.from_dict(snapshots[args.replica])

    try:
        return _show(ask, args)
    except requests.RequestException as failure:
        print(
            f"deltastore top: no facts from {args.url}: {failure}. It must be a running SGLang server with "
            "--kv-compress deltastore; say where with --url, and what opens it with --api-key",
            file=sys.stderr,
        )
        return 1
    except IndexError as unknown:
        print(f"deltastore top: {unknown}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


def _show(ask: Callable[[], StoreStats], args: argparse.Namespace) -> int:
    stats = ask()
    if args.json:
        while True:
            print(json.dumps(stats.as_dict()), flush=True)
            if args.once:
                return 0
            stats = _next(ask, stats, args.interval)
    if args.once:
        Console().print(render(stats))
        return 0
    with Live(render(stats), screen=sys.stdout.isatty(), auto_refresh=False) as live:
        while True:
            stats = _next(ask, stats, args.interval)
            live.update(render(stats), refresh=True)


def _next(ask: Callable[[], StoreStats], last: StoreStats, interval_s: float) -> StoreStats:
    time.sleep(max(interval_s, last.snapshot_seconds / _COST_SHARE))
    return ask()


def render(stats: StoreStats) -> Group:
    """The whole picture of one snapshot."""
    taken_at = time.strftime("%T", time.localtime(stats.taken_at_s))
    head = Text.assemble(("DeltaStore", "bold"), f"  tier {stats.tier} ({stats.format})  {taken_at}")
    errors = [Text(f"accounting: {error}", style="bold red") for error in stats.accounting_errors]
    if stats.untracked_tokens:
        errors.append(Text(f"{stats.untracked_tokens:,} tokens are in nodes that the facts have lost sight of"))
    if stats.recalibration_pays:
        errors.append(Text("a new calibration would pay: deltastore calibrate --text FILE --context-length T", "bold"))
    tables = [_saved(stats), _happened(stats), _hit_curve(stats), *([_canary(stats)] if stats.canary_share else [])]
    return Group(head, *errors, _pages(stats), Columns(tables), _hottest(stats.nodes))


def _pages(stats: StoreStats) -> Group:
    states = (
        ("nodes", stats.pages_in_nodes - stats.pages_held, "blue"),
        ("nodes that requests read now", stats.pages_held, "cyan"),
        ("running", stats.pages_running, "green"),
    )
    bar, drawn = Text("pages  "), 0
    for _, pages, color in states:
        cells = round(_BAR_CELLS * pages / stats.pages_total)
        cells = max(cells, 1) if pages else 0  # what there is can be seen
        bar.append("█" * cells, color)
        drawn += cells
    bar.append("░" * (_BAR_CELLS - drawn), "dim")
    legend = Text("       ")
    for name, pages, color in (*states, ("free", stats.pages_free, "dim")):
        legend.append(f"{name} {pages:,}   ", color)
    return Group(bar, legend)


def _saved(stats: StoreStats) -> Table:
    return _facts(
        "memory saved",
        ("against fp16 without sharing", f"{stats.times_unshared_fp16:.2f}x"),
        ("against SGLang's own tree in fp16", f"{stats.times_shared_fp16:.2f}x"),
        ("by compression", f"{stats.ratio:.2f}x"),
        ("by sharing", f"{stats.dedup:.2f}x"),
        ("  prefixes, branches", f"{stats.prefix_dedup:.2f}x, {stats.branch_dedup:.2f}x"),
        ("contexts, conversations", f"{stats.contexts:,}, {stats.conversations:,}"),
        ("tokens logical, stored", f"{stats.logical_tokens:,}, {stats.stored_tokens:,}"),
        *([("  coarse, of whole pages", f"{stats.coarse_tokens:,}")] if stats.coarse_tokens else []),
        ("bytes used, allocated", f"{_mebibytes(stats.used_bytes)}, {_mebibytes(stats.resident_bytes)}"),
    )


def _happened(stats: StoreStats) -> Table:
    hit_share = stats.hit_tokens / max(stats.prompt_tokens, 1)
    return _facts(
        "since the start",
        ("requests ended", f"{stats.requests:,}"),
        ("prompt tokens", f"{stats.prompt_tokens:,}"),
        ("  found stored", f"{hit_share:.1%}"),
        ("evictions (tokens)", f"{stats.evictions:,} ({stats.evicted_tokens:,})"),
        ("tokens encoded", f"{stats.encoded_tokens:,}"),
        *([("  again, coarser", f"{stats.demoted_tokens:,}")] if stats.demoted_tokens else []),
        ("read by decode", f"{_mebibytes(stats.decode_read_bytes)} in {stats.decode_steps:,} steps"),
        ("frames, sinks free", f"{stats.frames_free:,}, {stats.sinks_free:,}"),
        ("evictions for a sink", f"{stats.sink_evictions:,}"),
        ("calibration's staleness", f"{stats.calibration_staleness:.2f}x" if stats.calibration_staleness else "-"),
    )


def _hit_curve(stats: StoreStats) -> Table:
    sizes = {float(memory): getattr(stats, field) for field, memory in LABELLED["hit_rate"].items()}
    return _facts(
        "found stored, by KV memory",
        *((f"{size:g}x: {size * stats.capacity_tokens:,.0f} tokens", f"{rate:.1%}") for size, rate in sizes.items()),
        ("of recent prompt tokens", f"{stats.hit_rate_prompt_tokens:,}"),
    )


def _canary(stats: StoreStats) -> Table:
    rows = [(f"found stored: up to {name}", part) for name, part in stats.canary_by_hit.items()]
    rows += [(f"context: up to {name}", part) for name, part in stats.canary_by_context.items()]
    left_out = stats.canary_too_long, stats.canary_overtaken, stats.canary_not_comparable
    return _facts(
        "against raw attention",
        ("KL of a token, nats", f"{stats.canary_kl_mean:.2g}"),
        *((f"  {name}", f"{part.kl_mean:.2g}") for name, part in rows if part.tokens),
        ("the worst token's", f"{stats.canary_kl_worst:.2g}"),
        ("same most likely token", f"{stats.canary_top1_agreement:.1%}"),
        ("answers, tokens compared", f"{stats.canary_sequences:,}, {stats.canary_tokens:,}"),
        ("too long, no time, no text", ", ".join(f"{count:,}" for count in left_out)),
        ("seconds spent", f"{stats.canary_seconds:.1f}"),
    )


def _facts(title: str, *rows: tuple[str, str]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _fields(title: str, of: type[msgspec.Struct]) -> Table:
    shown = Table(title=title, title_justify="left")
    for name in ("field", "unit", "what it says"):
        shown.add_column(name)
    for name, fact in table(of).items():
        shown.add_row(name, fact.unit, fact.help)
    return shown


def _hottest(nodes: tuple[NodeStats, ...]) -> Table:
    table = Table(title="hottest nodes", title_justify="left")
    for name in ("node", "after", "from token", "tokens", "contexts", "running", "requests", "hits", "tokens hit"):
        table.add_column(name, justify="right")
    with_text = any(node.text for node in nodes)
    if with_text:
        table.add_column("begins", no_wrap=True)
    for node in sorted(nodes, key=lambda node: -node.hit_tokens)[:_NODES_SHOWN]:
        here = (node.start_tokens, node.tokens, node.contexts)
        numbers = (*here, node.running, node.requests, node.hits, node.hit_tokens)
        begins = [Text(_one_line(node.text))] if with_text else []
        table.add_row(str(node.id), str(node.parent or "start"), *(f"{value:,}" for value in numbers), *begins)
    return table


def _one_line(text: str) -> str:
    """What users wrote, without line ends and without what a terminal would obey."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _mebibytes(count_bytes: float) -> str:
    return f"{count_bytes / 2**20:,.1f} MiB"
