"""What the calibration that a server makes at its first start brings, by length and by kind of text: without it, with
it, and with one on the text's own kind.

    python -m benchmarks.first_start --texts wiki.txt --tokens 512 2048 5632 8000
    python -m benchmarks.first_start --texts code.txt chat.txt tools.txt --tokens 2048 --own

The second half of each text is measured; its own calibration is on the first half. A sequence's last tokens follow on
the others, which are stored. Rows are added as they come, and what is there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.provenance import RESULTS, provenance
from benchmarks.quality import MODELS, deltastore
from sglang_deltastore.lab.candidates import Ours
from sglang_deltastore.lab.quality import PROTOCOLS, measure, passes, sequences
from sglang_deltastore.lab.quality_command import load_model, model_folder
from sglang_deltastore.policy.calibration import Calibration, load
from sglang_deltastore.policy.tiers import ADAPTIVE, SERVED_TIERS, TIERS

NONE, SHIPPED, OWN = "none", "shipped", "own"
"""What a row is calibrated on: nothing, the text that comes with the package, the first half of the measured text."""
NEW_TOKENS = 512
"""Scored of a sequence in protocol continue; half of it where that is less."""
PACKED = tuple(name for name, tier in TIERS.items() if not tier.format.is_raw)
TIERS_BY_NAME = {name: SERVED_TIERS[name] for name in (*PACKED, ADAPTIVE.name)}
_IDENTITY = ("model", "text", "protocol", "tokens", "first_position", "calibrated_on")


def main() -> int:
    arguments = _parser().parse_args()
    rows = [json.loads(line) for line in arguments.json.read_text().splitlines()] if arguments.json.exists() else []
    done = {tuple(row[name] for name in _IDENTITY) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            _measure_model(name, arguments, done, Path(folder))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_start", description=__doc__.split("\n\n")[0])
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="plain texts, each of one kind")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--protocol", default="continue", choices=PROTOCOLS, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048], help="of a sequence (default: 2048)")
    parser.add_argument("--sequences", type=int, default=8, metavar="N", help="of a text (default: %(default)s)")
    parser.add_argument(
        "--first-position",
        type=int,
        default=0,
        metavar="P",
        help="of each sequence: as if so many tokens lay before it",
    )
    parser.add_argument("--tiers", nargs="+", default=PACKED, choices=TIERS_BY_NAME, help="default: all of a server's")
    parser.add_argument("--own", action="store_true", help="also calibrated on the first half of each text")
    parser.add_argument(
        "--json", type=Path, default=RESULTS / "quality-first-start.jsonl", help="rows are added (default: %(default)s)"
    )
    return parser


def _measure_model(name: str, arguments: argparse.Namespace, done: set[tuple[Any, ...]], folder: Path) -> None:
    model, tokenizer = load_model(model_folder(name))
    shipped = None
    for path in arguments.texts:
        calibrations: dict[str, Calibration | None] = {}
        for tokens in arguments.tokens:
            at = arguments.first_position
            asked = (NONE, SHIPPED, OWN) if arguments.own else (NONE, SHIPPED)
            missing = [on for on in asked if (name, path.name, arguments.protocol, tokens, at, on) not in done]
            if not missing:
                continue
            learned, measured = halves(path.read_text(encoding="utf-8"))
            shipped = shipped or calibrated(name, folder)
            calibrations = calibrations or {NONE: None, SHIPPED: shipped}
            if OWN in missing and OWN not in calibrations:
                (folder / "learned.txt").write_text(learned, encoding="utf-8")
                calibrations[OWN] = calibrated(name, folder, "--text", folder / "learned.txt")
            token_ids = sequences(tokenizer, measured, arguments.sequences, tokens, seed=0)
            candidates = candidates_of(arguments.tiers, {on: calibrations[on] for on in missing})
            with tqdm(total=passes(candidates, (arguments.protocol,)) * len(token_ids), unit="pass") as bar:
                bar.set_description(f"{name}, {path.name}, {tokens}")
                new = min(NEW_TOKENS, tokens // 2)
                rows = measure(model, token_ids, candidates, (arguments.protocol,), lambda _: bar.update(), new, at)
            source = {"model": name, "text": path.name, "sequences": len(token_ids), "tokens": tokens}
            source |= {"first_position": at}
            source |= {"new_tokens": new} if arguments.protocol == "continue" else {}
            with arguments.json.open("a") as out:
                for row in rows:
                    config, calibrated_on = row["config"].split(", ")
                    told = {"config": config, "calibrated_on": calibrated_on}
                    out.write(json.dumps(source | row | told | provenance(model.device.type)) + "\n")


def candidates_of(tiers: Sequence[str], calibrations: dict[str, Calibration | None]) -> list[Ours]:
    packed = [Ours(name, TIERS_BY_NAME[name]) for name in tiers]
    return [
        replace(ours, name=f"{ours.name}, {on}", calibration=calibration)
        for on, calibration in calibrations.items()
        for ours in packed
    ]


def calibrated(model: str, folder: Path, *options: object) -> Calibration:
    """By the command, which runs what the server runs at its first start."""
    deltastore("calibrate", model, "-o", folder / "made.safetensors", *options)
    return load(folder / "made.safetensors")


def halves(text: str) -> tuple[str, str]:
    middle = text.rfind("\n", 0, len(text) // 2) + 1
    return text[:middle], text[middle:]


if __name__ == "__main__":
    sys.exit(main())
