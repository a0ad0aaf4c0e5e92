"""`deltastore downstream`: the tasks that the data allows, with every cache."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ...policy.tiers import DEFAULT_TIER, TIERS
from .. import peers, published
from .answers import CacheFactory
from .data import TASKS, possible_tasks, read_data
from .examples import DataError
from .scores import evaluate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="a Hugging Face causal LM")
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="files or folders: .txt or .raw filler, .jsonl of PIQA, key-value rows or transcripts; each may be .zst",
    )
    parser.add_argument("--tier", nargs="+", default=[DEFAULT_TIER], choices=list(TIERS), help="tiers to compare")
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="NAME", help="peers by their row's name in `deltastore quality`"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="default: all that the data allows")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096], help="lengths of the contexts")
    parser.add_argument("--examples", type=int, default=20, help="examples of each task and length; default: 20")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens that may agree; default: 64")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one row a line")


def run(args: argparse.Namespace) -> int:
    try:
        rows = _run(args)
    except DataError as error:
        print(f"deltastore downstream: {error}", file=sys.stderr)
        return 1
    _show(rows)
    return 0


def _run(args: argparse.Namespace) -> list[dict[str, Any]]:
    if min(args.tokens) < 1 or args.examples < 1 or args.new_tokens < 1:
        raise DataError("--tokens, --examples and --new-tokens must be at least 1")
    if not (args.model / "config.json").exists():
        raise DataError(f"--model {args.model}: no Hugging Face model folder (config.json is missing)")
    data = read_data(args.data)
    tasks = args.tasks or possible_tasks(data)
    if missing := sorted(set(tasks) - set(possible_tasks(data))):
        raise DataError(f"--tasks {' '.join(missing)}: --data holds nothing for it; see `deltastore downstream --help`")

    known = {method.name: method for method in (*peers.methods(residual=True), published.absmax(4, 2))}
    if unknown := sorted(set(args.against) - set(known)):
        raise DataError(f"--against {', '.join(unknown)}: unknown; known are {', '.join(known)}")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..cache import DeltaStoreCache
    from ..simulated import SimulatedCache

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    caches: dict[str, CacheFactory] = {"plain": lambda: None}
    for tier in args.tier:
        caches[tier] = lambda tier=tier: DeltaStoreCache(model.config, tier=tier)
    for name in args.against:
        caches[name] = lambda name=name: SimulatedCache(model.config, known[name])
    rows = []
    for task in tasks:
        for tokens in args.tokens:
            compared = {name: make for name, make in caches.items() if task != "agreement" or name != "plain"}
            scores = evaluate(model, tokenizer, task, data, compared, tokens, args.examples, args.seed, args.new_tokens)
            rows += [{"model": args.model.name, "seed": args.seed, **score.row()} for score in scores]
            if args.json:  # after each task, so that a run that is stopped leaves what it found
                args.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table("task", "context", "cache", "right", "rate", "95% interval", "agreed tokens, mean / median")
    for row in rows:
        agreed = (
            ""
            if row["agreed_mean"] is None
            else (f"{row['agreed_mean']:.1f} / {row['agreed_median']:g} of {row['agreed_limit']}")
        )
        table.add_row(
            row["task"],
            str(row["context_tokens"]),
            row["cache"],
            f"{row['right']}/{row['total']}",
            f"{row['rate']:.3f}",
            f"{row['low']:.3f} .. {row['high']:.3f}",
            agreed,
        )
    Console().print(table)
