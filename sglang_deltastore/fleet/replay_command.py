"""`deltastore replay`: a trace through radix caches of given sizes."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..policy.precision import LADDERS
from .configs import model_from_config
from .formats import FORMATS
from .kv import FP16, parse_tier
from .page_pool import DEFAULT_CHUNK_TOKENS
from .plan_command import FILE_WIDTH
from .replay import Costs
from .study import Study, parse_budget, parse_storage, study
from .tables import Model, pick, read_table
from .traces import Trace

DEFAULT_BUDGETS = "1M,2M,4M,8M,16M,32M"
DEFAULT_TIERS = "fp16,fp8,lossless,conservative"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", type=Path, help=".jsonl or .csv, also .zst or .gz")
    parser.add_argument("--format", default="auto", choices=("auto", *FORMATS), help="default: by the first line")
    parser.add_argument(
        "--budgets",
        default=DEFAULT_BUDGETS,
        help="KV memory: 4M is that of four million fp16 tokens, 80GB is bytes (default: %(default)s)",
    )
    parser.add_argument(
        "--tiers",
        default=DEFAULT_TIERS,
        help=f"fp16, fp8, tiers, {', '.join(LADDERS)}, NAME=RATIO for an assumed one (default: %(default)s)",
    )
    parser.add_argument("--model", default="Llama-3-8B", help="its shape gives the tiers' bytes (default: %(default)s)")
    parser.add_argument("--tables", type=Path, metavar="FOLDER", help="your models.toml")
    parser.add_argument(
        "--storage",
        action="append",
        default=[],
        metavar="NAME=SIZE[@SPEED]",
        help="behind the KV memory, written through, the nearest first: --storage host=256GB@25GB "
        "--storage disk=4TB@3GB (SPEED: a second, where time is asked for)",
    )
    parser.add_argument("--page-tokens", type=int, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--chunk-tokens", type=int, default=DEFAULT_CHUNK_TOKENS, metavar="N", help="of prefill (default: %(default)s)"
    )
    parser.add_argument(
        "--sessions-at-once", type=int, default=16, metavar="N", help="Claude Code traces only (default: %(default)s)"
    )
    parser.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="a bad line: stop, or leave out and count"
    )
    costs = parser.add_argument_group("time, from rates you measured; without them requests come one after another")
    costs.add_argument("--prefill-tokens-per-s", type=float, metavar="N", help="prompt tokens one GPU computes")
    costs.add_argument("--decode-tokens-per-s", type=float, metavar="N", help="answer tokens one GPU makes in all")
    costs.add_argument("--stream-tokens-per-s", type=float, metavar="N", help="answer tokens one request gets")
    costs.add_argument("--workers", type=int, default=1, metavar="N", help="GPUs (default: %(default)s)")
    costs.add_argument(
        "--ttft-target-s", type=float, metavar="S", help="find the GPUs for which 9 in 10 wait no longer"
    )
    costs.add_argument("--budget-per-worker", action="store_true", help="each of the GPUs brings the budget along")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="hit rate against budget, .png or .svg")


def run(args: argparse.Namespace) -> int:
    console = Console() if sys.stdout.isatty() else Console(width=FILE_WIDTH)
    try:
        _replay(args, console)
    except (ValueError, OSError) as error:
        print(f"deltastore replay: {error}", file=sys.stderr)
        return 2
    return 0


def _replay(args: argparse.Namespace, console: Console) -> None:
    trace = Trace(args.trace, args.page_tokens, args.format, args.on_error, args.sessions_at_once)
    path = Path(args.model)
    table = read_table(Model, "models.toml", args.tables)
    model = model_from_config(path) if path.exists() else pick(table, args.model, "model")
    if model.state_bytes:
        raise ValueError(
            f"--model {args.model}: a sequence keeps a state of {model.state_bytes:,} bytes besides KV, and SGLang "
            "evicts such models' caches in another way; give a model that keeps keys and values alone"
        )
    budgets = [parse_budget(text.strip()) for text in args.budgets.split(",")]
    tiers = [parse_tier(text.strip()) for text in args.tiers.split(",")]
    costs = _costs(args)
    storages = [parse_storage(text) for text in args.storage]
    if args.picture:
        from .pictures import hit_rate_against_budget  # here: whether it can be drawn is known before the replay
    result = study(
        trace, model, budgets, tiers, costs, args.ttft_target_s, args.chunk_tokens, args.budget_per_worker, storages
    )
    _print(console, trace, model, result, costs, args)
    if args.json:
        told = {**report(trace, model, result, costs, args.ttft_target_s), "storages": args.storage}
        args.json.write_text(json.dumps(told, indent=1) + "\n")
    if args.picture:
        hit_rate_against_budget(trace.path.name, hit_rates(result, {b.text: b.bytes(model) for b in budgets}, model),
                                args.picture)  # fmt: skip
    for path in filter(None, (args.json, args.picture)):
        console.print(f"wrote {path}")


def report(trace: Trace, model: Model, result: Study, costs: Costs | None, target_s: float | None) -> dict[str, Any]:
    """Everything of one study, for programs."""
    return {
        "trace": trace.path.name,
        "format": trace.format,
        "block_tokens": trace.block_tokens,
        "page_tokens": trace.page_tokens,
        "sessions_at_once": trace.sessions_at_once if trace.format == "claude" else None,
        "model": model.name,
        "costs": asdict(costs) if costs else None,
        "ttft_target_s": target_s,
        "skipped_lines": result.skipped,
        "endless": {**asdict(result.endless), "hit_rate": result.endless.hit_rate},
        "sharing": asdict(result.sharing),
        "rows": [row.as_dict() for row in result.rows],
    }


def hit_rates(result: Study, bytes_by_budget: dict[str, float], model: Model) -> dict[str, list[tuple[float, float]]]:
    """tier -> (memory in millions of fp16 tokens, hit rate)."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in result.rows:
        millions = bytes_by_budget[row.budget] / FP16.bytes_per_token(model) / 1e6
        lines.setdefault(row.tier, []).append((millions, row.outcome.hit_rate))
    return lines


def _costs(args: argparse.Namespace) -> Costs | None:
    rates = (args.prefill_tokens_per_s, args.decode_tokens_per_s, args.stream_tokens_per_s)
    if all(rate is None for rate in rates):
        if args.ttft_target_s is not None:
            raise ValueError("--ttft-target-s needs the three rates, such as --prefill-tokens-per-s")
        if args.budget_per_worker:
            raise ValueError("--budget-per-worker needs the three rates, such as --prefill-tokens-per-s")
        return None
    if None in rates:
        raise ValueError("give all of --prefill-tokens-per-s, --decode-tokens-per-s, --stream-tokens-per-s, or none")
    return Costs(*rates, workers=args.workers)


def _print(
    console: Console, trace: Trace, model: Model, result: Study, costs: Costs | None, args: argparse.Namespace
) -> None:
    endless, sharing = result.endless, result.sharing
    console.print(
        f"{trace.path.name}: {trace.format}, {endless.requests:,} requests, {endless.prompt_tokens:,} prompt tokens, "
        f"{endless.block_references:,} blocks of {trace.block_tokens} tokens; bytes a token are {model.name}'s"
    )
    console.print(
        f"Endless cache: {endless.hit_rate:.2%} hit, each token stored stands for "
        f"{endless.prompt_tokens / max(endless.computed_tokens, 1):.2f}. Of whole blocks {sharing.factor:.2f} = "
        f"{sharing.temporal:.2f} (turns repeat their past) x {sharing.across:.2f} (conversations and branches share)"
    )
    if result.skipped:
        console.print(f"[yellow]{result.skipped} bad lines left out[/yellow], the first: {'; '.join(result.errors)}")
    clock = "one after another" if costs is None else f"timed, {costs}"
    table = Table(title=f"Hit rate and prompt tokens computed; {clock}", box=box.SIMPLE)
    # What is evicted where storages lie behind is no loss yet.
    evicted = () if args.storage else ("evicted pages",)
    for name in ("budget", "tier", "holds tokens", "hit rate", "computed", "against first", *evicted, "refused"):
        words = name in ("budget", "tier")
        table.add_column(name, justify="left" if words else "right", no_wrap=words)
    for text in args.storage:
        table.add_column(f"from {text.partition('=')[0]}", justify="right")
    levels = any(len(row.level_bits) > 1 for row in result.rows)
    if levels:
        for name in ("hit bits", "worst", "demoted", "spared"):
            table.add_column(name, justify="right")
    if costs:
        for name in ("TTFT p50", "p90", "p99"):
            table.add_column(name, justify="right")
    if args.ttft_target_s is not None:
        table.add_column(f"GPUs for {args.ttft_target_s:g} s", justify="right")
    first = {}
    for row in result.rows:
        outcome = row.outcome
        base = first.setdefault(row.budget, outcome.computed_tokens)
        cells = [
            row.budget, row.tier, f"{row.capacity_tokens:,}", f"{outcome.hit_rate:.2%}",
            f"{outcome.computed_tokens / 1e6:,.2f} M", f"{outcome.computed_tokens / max(base, 1) - 1:+.1%}",
            *(f"{outcome.evicted_pages:,}" for _ in evicted), f"{outcome.rejected_requests:,}",
        ]  # fmt: skip
        cells += [f"{tokens / max(outcome.prompt_tokens, 1):.2%}" for tokens in outcome.loaded_tokens]
        if levels:
            cells += [
                f"{row.mean_hit_bits:.2f}", f"{row.worst_hit_bits:.2f}",
                f"{outcome.demoted_pages:,}", f"{outcome.spared_pages:,.0f}",
            ]  # fmt: skip
        if costs:
            waits = (outcome.ttft_p50_s, outcome.ttft_p90_s, outcome.ttft_p99_s)
            cells += ["never" if wait == math.inf else f"{wait:.2f} s" for wait in waits if wait is not None]
        if args.ttft_target_s is not None:
            cells.append("more than 4096" if row.workers_needed is None else str(row.workers_needed))
        table.add_row(*cells)
    console.print(table)
