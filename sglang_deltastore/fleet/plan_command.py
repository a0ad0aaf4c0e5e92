"""`deltastore plan`: GPUs, money, energy, CO2 and water for a workload, with and without a packed KV cache."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .claims import Checked, Tables, check_claims
from .configs import model_from_config
from .kv import FP16, KvTier, parse_tier, rank_heads
from .planner import ASSUMED_BECAUSE, Assumptions, Fleet, Plan, Workload, growth, plans
from .tables import pick

FILE_WIDTH = 130
"""Columns of the tables when they do not go to a terminal."""

DEFAULT_TIERS = "fp16,fp8,lossless,conservative"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=("claims",), help="derive the published scenarios instead of a plan")
    parser.add_argument("--model", default="Llama-3-8B", help="a row of models.toml, or a Hugging Face folder")
    parser.add_argument("--gpu", default="H100-80", help="a row of gpus.toml (default: %(default)s)")
    parser.add_argument("--price", type=float, metavar="USD", help="of a GPU hour, instead of the table's")
    parser.add_argument(
        "--tiers", default=DEFAULT_TIERS, help="comma-separated: fp16, fp8, tiers, NAME=RATIO (default: %(default)s)"
    )
    parser.add_argument("--tables", type=Path, metavar="FOLDER", help="your gpus.toml, models.toml, energy.toml")
    workload = parser.add_argument_group("workload")
    workload.add_argument("--users", type=int, default=10_000, help="default: %(default)s")
    for name, kind, meaning in (
        ("shared_prefix_tokens", int, "system prompt and tools that all users share"),
        ("context_tokens", int, "of one user at the end, prefix included (default: prefix + turns x turn tokens)"),
        ("turns", int, "of a conversation"),
        ("turn_tokens", int, "question and answer of one turn"),
        ("branches", int, "alternative last turns a user keeps"),
        ("resident_share", float, "of users whose context stays in memory"),
        ("active_share", float, "of users being answered at any moment"),
        ("tokens_per_s", float, "that each of those gets"),
    ):
        default = next(field.default for field in fields(Workload) if field.name == name)
        shown = "" if name == "context_tokens" else f" (default: {default})"
        workload.add_argument(_flag(name), type=kind, default=default, metavar="N", help=meaning + shown)
    assumed = parser.add_argument_group("assumptions")
    for field in fields(Assumptions):
        assumed.add_argument(
            _flag(field.name),
            type=type(field.default),
            default=field.default,
            metavar="N",
            help=f"{ASSUMED_BECAUSE[field.name]} (default: {field.default})".replace("%", "%%"),
        )
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="everything, for programs")
    output.add_argument("--picture", type=Path, metavar="FILE", help="cost against users, .png or .svg")
    output.add_argument("--html", type=Path, metavar="FILE", help="a page of its own whose sliders move the picture")


def run(args: argparse.Namespace) -> int:
    console = Console() if sys.stdout.isatty() else Console(width=FILE_WIDTH)
    try:
        if args.preset == "claims":
            _claims(args, console)
        else:
            _plan(args, console)
    except (ValueError, OSError) as error:
        print(f"deltastore plan: {error}", file=sys.stderr)
        return 2
    return 0


def _claims(args: argparse.Namespace, console: Console) -> None:
    checked = check_claims(args.tables)
    console.print(_claims_table(checked))
    counts = {verdict: sum(row.verdict == verdict for row in checked) for verdict in _VERDICT_STYLE}
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + f", of {len(checked)}")
    console.print(
        "Inputs, formulas and tolerances: data/claims.toml, claims.py. GPUs counts weights and a 12% reserve."
    )
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in checked], indent=1) + "\n")


def _plan(args: argparse.Namespace, console: Console) -> None:
    fleet = _fleet(args)
    tiers = [parse_tier(text.strip()) for text in args.tiers.split(",")]
    results = plans(fleet, tiers)
    report = _report(fleet, tiers, results)
    console.print(_assumption_table(report))
    console.print(_plan_table(results))
    for note in _padding_notes(fleet, tiers, results):
        console.print(note)
    console.print(_growth_table(report["growth"]))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.picture:
        from .pictures import cost_against_users

        cost_against_users(fleet, tiers, args.picture)
    if args.html:
        from .interactive_page import write_page

        write_page(fleet, tiers, report, args.html)
    for path in filter(None, (args.json, args.picture, args.html)):
        console.print(f"wrote {path}")


def _fleet(args: argparse.Namespace) -> Fleet:
    tables = Tables.read(args.tables)
    path = Path(args.model)
    model = model_from_config(path) if path.exists() else pick(tables.models, args.model, "model")
    gpu = pick(tables.gpus, args.gpu, "GPU")
    if args.price is not None:
        gpu = type(gpu)(**{**asdict(gpu), "price_usd_per_h": args.price, "price_source": "--price"})
    workload = Workload(**{field.name: getattr(args, field.name) for field in fields(Workload)})
    assumptions = Assumptions(**{field.name: getattr(args, field.name) for field in fields(Assumptions)})
    return Fleet(model, gpu, tables.energy, workload, assumptions)


def _report(fleet: Fleet, tiers: list[KvTier], results: list[Plan]) -> dict[str, Any]:
    work = fleet.workload
    fp16 = FP16.bytes_per_token(fleet.model)
    return {
        "model": asdict(fleet.model),
        "gpu": asdict(fleet.gpu),
        "energy": {name: asdict(figure) for name, figure in fleet.energy.items()},
        "workload": asdict(work),
        "assumptions": asdict(fleet.assumptions),
        "fp16_bytes_per_token": fp16,
        "fp16_gb_if_every_turn_is_a_snapshot": work.resident_users * work.snapshot_tokens_per_user * fp16 / 1e9,
        "plans": [asdict(result) for result in results],
        "growth": growth(fleet, tiers),
    }


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _assumption_table(report: dict[str, Any]) -> Table:
    table = Table("what", "value", "why, or where from", title="What this plan assumes", box=box.SIMPLE)
    model, gpu = report["model"], report["gpu"]
    shape = f"{model['layers']} layers, {model['kv_heads']} KV heads of {model['head_dim']}"
    weights = f"{model['parameters'] * model['weight_bytes_per_parameter'] / 1e9:.1f} GB of weights"
    table.add_row(model["name"], f"{shape}; {weights}", model["source"])
    size = f"{gpu['memory_gb']:g} GB, {gpu['bandwidth_gb_per_s']:g} GB/s, {gpu['power_w']:g} W"
    table.add_row(gpu["name"], size, gpu["spec_source"])
    table.add_row("price", f"${gpu['price_usd_per_h']:g} a GPU hour", gpu["price_source"])
    for name, value in report["workload"].items():
        table.add_row(name, f"{value:,}", "workload")
    for name, value in report["assumptions"].items():
        table.add_row(name, f"{value:,}", ASSUMED_BECAUSE[name])
    for name, figure in report["energy"].items():
        table.add_row(name, f"{figure['value']:,} {figure['unit']}", figure["source"])
    table.add_row(
        "every turn a snapshot",
        f"{report['fp16_gb_if_every_turn_is_a_snapshot']:,.0f} GB",
        "fp16 KV if each turn were stored whole: the baseline of published temporal factors, not of SGLang",
    )
    return table


def _padding_notes(fleet: Fleet, tiers: list[KvTier], results: list[Plan]) -> list[str]:
    """Why a ratio is not the one of the tier on one GPU: each GPU pads its pages by itself."""
    by_label = {tier.label: tier for tier in tiers}
    notes = []
    for result in results:
        tier, page = by_label.get(result.tier), fleet.assumptions.page_tokens
        if tier is None or f"{tier.ratio(fleet.model, page):.2f}" == f"{result.ratio:.2f}":
            continue
        heads = rank_heads(fleet.model, result.tensor_parallel)
        notes.append(
            f"{tier.label}: {result.ratio:.2f} and not {tier.ratio(fleet.model, page):.2f} as on one GPU, since each "
            f"of {result.tensor_parallel} GPUs pads its own pages of {heads} KV head{'s' if heads > 1 else ''}"
        )
    return notes


def _plan_table(results: list[Plan]) -> Table:
    """One column for each tier."""
    stock = next((result for result in results if result.shared and result.tier == FP16.name), None)
    table = Table(title="Fleet by tier", box=box.SIMPLE)
    table.add_column("")
    for result in results:
        table.add_column(result.tier, justify="right")
    for name, show in _PLAN_ROWS:
        table.add_row(name, *(show(result) for result in results))
    if stock is not None:
        differences = (result.cost_usd_per_year - stock.cost_usd_per_year for result in results)
        table.add_row("$/year against stock fp16", *(f"{difference:+,.0f}" for difference in differences))
    return table


_PLAN_ROWS: tuple[tuple[str, Callable[[Plan], str]], ...] = (
    ("ratio to fp16", lambda plan: f"{plan.ratio:.2f}"),
    ("bytes a token", lambda plan: f"{plan.bytes_per_token:,.0f}"),
    ("KV of the fleet, GB", lambda plan: f"{plan.kv_bytes / 1e9:,.1f}"),
    ("weights of the fleet, GB", lambda plan: f"{plan.weights_bytes / 1e9:,.1f}"),
    ("GPUs", lambda plan: f"[bold]{plan.gpus:,}[/bold]"),
    ("groups x GPUs of each", lambda plan: f"{plan.replicas:,} x {plan.tensor_parallel}"),
    ("groups that memory needs", lambda plan: f"{plan.replicas_memory:,}"),
    ("groups that decode bandwidth needs", lambda plan: f"{plan.replicas_bandwidth:,}"),
    ("what binds", lambda plan: plan.binds),
    ("$/year", lambda plan: f"{plan.cost_usd_per_year:,.0f}"),
    ("MWh/year", lambda plan: f"{plan.energy_mwh_per_year:,.0f}"),
    ("t CO2/year", lambda plan: f"{plan.co2_t_per_year:,.0f}"),
    ("m3 of water/year", lambda plan: f"{plan.water_l_per_year / 1000:,.0f}"),
)


def _growth_table(steps: list[dict[str, Any]]) -> Table:
    table = Table(title="Growth: GPUs ($/year)", box=box.SIMPLE)
    table.add_column("users", justify="right")
    for result in steps[0]["plans"]:
        table.add_column(result["tier"], justify="right")
    for step in steps:
        cells = (f"{result['gpus']:,} ({result['cost_usd_per_year']:,.0f})" for result in step["plans"])
        table.add_row(f"{step['users']:,}", *cells)
    return table


_VERDICT_STYLE = {"follows": "green", "only under another reading": "yellow", "does not follow": "red"}


def _claims_table(checked: list[Checked]) -> Table:
    table = Table(title="Published figures, and what follows from their own inputs", box=box.SIMPLE)
    for name in ("scenario: figure, and why", "claimed", "derived", "other reading", "verdict"):
        table.add_column(name, justify="right" if name in ("claimed", "derived", "other reading") else "left")
    for row in checked:
        what = f"{row.scenario}: [bold]{row.quantity}[/bold]\n  [dim]{row.why}[/dim]"
        reading = "" if row.reading is None else _number(row.reading)
        style = _VERDICT_STYLE[row.verdict]
        verdict = f"[{style}]{row.verdict}[/{style}]"
        table.add_row(what, _number(row.claimed), _number(row.derived), reading, verdict)
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:,.1f}"
