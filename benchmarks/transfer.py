"""How far a calibration carries: KL on texts of several kinds, without one, with a first start's, with one of the same kind.

    python -m benchmarks.transfer --texts wiki.txt code.txt chat.txt --tokens 2048

The second half of each text is measured. A first start's calibration is of the text that comes with the package; the
text's own is of its first half. Rows are written as they come, and those that are there are not measured again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.quality import MODELS, RESULTS

ROWS = RESULTS / "quality-transfer.jsonl"
SHIPPED, OWN = "shipped", "own"
TOKENS_OF_A_TEXT = 4096
"""Measured, in as many sequences as that makes, one at least."""


def main() -> int:
    arguments = _parser().parse_args()
    done = {(row["model"], row["text"], row["tokens"], row["calibrated_on"]) for row in _rows(arguments.json)}
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.models:
            for text in arguments.texts:
                for calibrated_on in (SHIPPED, OWN):
                    wanted = [t for t in arguments.tokens if (model, text.name, t, calibrated_on) not in done]
                    if wanted:
                        _measure(model, text, calibrated_on, wanted, Path(folder), arguments.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__.split("\n")[0])
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="plain texts, each of one kind")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048], help="of a sequence; its first half is stored")
    parser.add_argument("--json", type=Path, default=ROWS, help="rows are added to it (default: %(default)s)")
    return parser


def _measure(
    model: str, text: Path, calibrated_on: str, lengths_tokens: list[int], folder: Path, json_path: Path
) -> None:
    halves = _halves(text, folder)
    calibration = folder / f"{model}-{SHIPPED if calibrated_on == SHIPPED else text.stem}.safetensors"
    if not calibration.exists():
        _deltastore("calibrate", model, "-o", calibration, *(("--text", halves[0]) if calibrated_on == OWN else ()))
    for tokens in lengths_tokens:
        found = folder / "rows.jsonl"
        _deltastore(
            "quality", model, "--text", halves[1], "--calibration", calibration, "--protocol", "continue",
            "--tokens", tokens, "--sequences", max(TOKENS_OF_A_TEXT // tokens, 1), "--json", found,
        )  # fmt: skip
        with json_path.open("a") as rows:
            for row in _rows(found):
                told = _told(row["config"], calibrated_on)
                if told:
                    rows.write(json.dumps(row | {"text": text.name, "calibrated_on": told}) + "\n")


def _told(config: str, calibrated_on: str) -> str | None:
    """What a row is calibrated on; None for one that another run has as well."""
    if config.endswith("calibrated"):
        return calibrated_on
    return "none" if calibrated_on == SHIPPED and config != "raw" else None


def _halves(text: Path, folder: Path) -> tuple[Path, Path]:
    content = text.read_text(encoding="utf-8")
    middle = content.rfind("\n", 0, len(content) // 2) + 1
    halves = folder / f"{text.stem}.calibration", folder / f"{text.stem}.measured"
    for path, half in zip(halves, (content[:middle], content[middle:]), strict=True):
        path.write_text(half, encoding="utf-8")
    return halves


def _deltastore(command: str, model: str, *options: object) -> None:
    """Run a subcommand as a user would; its progress shows, its table does not."""
    words = [sys.executable, "-m", "sglang_deltastore.cli", command, "--model", model, *options]
    subprocess.run(list(map(str, words)), check=True, stdout=subprocess.DEVNULL)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
