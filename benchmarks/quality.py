"""Quality of every configuration on the embedded models: calibrate, measure all suites, write rows, tables, pictures.

    python -m benchmarks.quality --text test.txt --calibration-text other.txt

The calibration never sees the text that is measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.provenance import RESULTS, write_rows
from sglang_deltastore.lab.figures_command import markdown as figures_table
from sglang_deltastore.lab.plot import pareto
from sglang_deltastore.lab.quality_command import SUITE_NAMES, markdown

MODELS = ("smollm2", "gemma3-270m")
#: long suites whose point protocol `all` makes
ONE_PROTOCOL_SUITES = ("peers", "ablations")
#: not in the picture: steps and dead ends
UNDRAWN_SUITES = ("ablations",)


def main() -> int:
    arguments = _parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.models:
            calibration = (arguments.calibrations or Path(folder)) / f"{model}.safetensors"
            if not calibration.exists():
                # What the tables of 512 tokens were made with; the command's defaults are for longer contexts.
                fitted = ("--tokens", 512, "--context-length", 512, "--by-layer")
                deltastore("calibrate", model, "--text", arguments.calibration_text, "-o", calibration, *fitted)
            rows = []
            for suite in arguments.suites:
                found = Path(folder) / "rows.jsonl"
                deltastore(
                    "quality", model, "--text", arguments.text, "--suite", suite, "--calibration", calibration,
                    "--json", found, "--sequences", arguments.sequences, "--tokens", arguments.tokens,
                    "--protocol", "all" if suite in ONE_PROTOCOL_SUITES else "both",
                )  # fmt: skip
                rows += _rows(found)
            found = RESULTS / f"figures-{model}.jsonl"
            deltastore("figures", model, "--text", arguments.text, "--tokens", arguments.tokens, "--json", found)
            _write(model, rows, _rows(found))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="plain text to measure on")
    parser.add_argument("--calibration-text", type=Path, required=True, help="another plain text, to calibrate on")
    parser.add_argument(
        "--calibrations", type=Path, metavar="FOLDER", help="keep the calibrations here, and use those that are there"
    )
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--suites", nargs="+", default=SUITE_NAMES, choices=SUITE_NAMES)
    parser.add_argument("--sequences", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512)
    return parser


def deltastore(command: str, model: str, *options: object) -> None:
    """Run a subcommand as a user would; its progress shows, its table does not."""
    words = [sys.executable, "-m", "sglang_deltastore.cli", command, "--model", model, *options]
    subprocess.run(list(map(str, words)), check=True, stdout=subprocess.DEVNULL)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write(model: str, rows: list[dict[str, Any]], figures: list[dict[str, Any]]) -> None:
    write_rows(RESULTS / f"quality-{model}.jsonl", rows)
    sections = [f"# Quality: {model}", *(f"- {line}" for line in verdicts(rows))]
    for suite in dict.fromkeys(row["suite"] for row in rows):
        sections += ["", f"## Suite `{suite}`", "", markdown([row for row in rows if row["suite"] == suite])]
    sections += ["", "## Keys, values and attention", "", figures_table(figures)]
    (RESULTS / f"quality-{model}.md").write_text("\n".join(sections) + "\n")
    drawn = [row for row in rows if row["suite"] not in UNDRAWN_SUITES and row["config"] != "raw"]
    if drawn:
        pareto(drawn, f"{model}, {rows[0]['text']}", RESULTS / f"quality-{model}.png")


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """For each of our calibrated rows that evicts nothing: the best peer that takes no more bits, and the cheapest
    one that loses less."""
    lines = []
    scored = [row for row in rows if row["suite"] == "peers" and row["protocol"] == "all"]
    peers = [row for row in scored if row["source"] == "peer"]
    for row in scored:
        if row["source"] != "ours" or not row["config"].endswith("calibrated"):
            continue
        cheaper = [peer for peer in peers if peer["bits_per_value"] <= row["bits_per_value"]]
        better = [peer for peer in peers if peer["kl_mean"] < row["kl_mean"]]
        line = f"{_describe(row)}"
        if cheaper:
            best = min(cheaper, key=lambda peer: peer["kl_mean"])
            line += f"; best peer at no more bits: {_describe(best)}, {best['kl_mean'] / row['kl_mean']:.1f} times ours"
        if better:
            least = min(better, key=lambda peer: peer["bits_per_value"])
            line += f"; cheapest peer that loses less: {_describe(least)}"
        lines.append(line)
    return lines


def _describe(row: dict[str, Any]) -> str:
    return f"{row['config']} ({row['bits_per_value']:.2f} bits, KL {row['kl_mean']:.4f})"


if __name__ == "__main__":
    sys.exit(main())
