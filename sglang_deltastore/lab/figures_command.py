"""`deltastore figures`: what is published of keys, values and attention, measured on a model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .quality_command import QualityError, check_folder, load_model, model_folder, read_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Hugging Face folder, or the name of an embedded model")
    parser.add_argument("--text", required=True, type=Path, metavar="FILE", help="plain text to measure on")
    parser.add_argument("--sequences", type=int, default=2, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, metavar="T", help="of each sequence (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="picks where sequences start (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one row a line")


def run(args: argparse.Namespace) -> int:
    try:
        rows = _measure(args)
    except (QualityError, ValueError) as error:
        print(f"deltastore figures: {error}", file=sys.stderr)
        return 1
    print(markdown(rows))
    if args.json:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


def _measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    if args.sequences < 1 or args.tokens < 2:
        raise QualityError(f"--sequences {args.sequences} --tokens {args.tokens}: at least 1 of at least 2 are needed")
    check_folder("--json", args.json)  # before anything is measured
    text, folder = read_text(args.text), model_folder(args.model)

    from .figures import figures
    from .provenance import provenance
    from .quality import sequences

    model, tokenizer = load_model(folder)
    model.set_attn_implementation("eager")
    token_ids = sequences(tokenizer, text, args.sequences, args.tokens, args.seed).to(model.device)
    source = {"model": args.model, "text": args.text.name, "sequences": args.sequences, "tokens": args.tokens}
    return [{**source, "seed": args.seed, **row, **provenance(model.device.type)} for row in figures(model, token_ids)]


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| figure | measured | published |", "|---|---|---|"]
    for row in rows:
        value = "none" if row["value"] is None else f"{row['value']:.3g}"
        lines.append(f"| {row['figure']} | {value} | {row['claimed']} |")
    return "\n".join(lines)
