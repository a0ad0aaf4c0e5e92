"""Measure every family, or those named, and hold what was found against what is promised.

python -m benchmarks.families --json benchmarks/results/models.jsonl
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from benchmarks.provenance import provenance, write_rows

from .engines import import_sglang
from .measure import Row, row_of
from .shapes import FAMILIES


def main() -> int:
    arguments = _parser().parse_args()
    names = arguments.families or list(FAMILIES)
    if unknown := set(names) - set(FAMILIES):
        raise SystemExit(f"families {sorted(unknown)}: unknown; known are {', '.join(FAMILIES)}")
    import_sglang()
    found: dict[str, Row] = {}
    # Its processes fork while this one has no other thread: each then forks the engines of one family after another.
    with ProcessPoolExecutor(arguments.at_once, mp_context=multiprocessing.get_context("fork")) as pool:
        futures = {pool.submit(row_of, name, arguments.logs): name for name in names}
        for future in tqdm(as_completed(futures), total=len(names), unit="family"):
            found[futures[future]] = {**future.result(), **provenance()}
            if arguments.json:
                _write(arguments.json, found)
    broken = [complaint for row in found.values() if (complaint := _complaint(row))]
    print("\n".join(broken), file=sys.stderr)
    return 1 if broken else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__.split("\n")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON row a line, or replace those there")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the logs of every engine")
    parser.add_argument("--at-once", type=int, default=2, help="families at a time (default: %(default)s)")
    return parser


def _write(path: Path, found: dict[str, Row]) -> None:
    """Rows of families that were not measured now stay."""
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = {row["family"]: row for row in kept} | found
    write_rows(path, [rows[name] for name in FAMILIES if name in rows])


def _complaint(row: Row) -> str | None:
    family = FAMILIES[row["family"]]
    if row["state"] == family.state and family.says in row.get("message", ""):
        return None
    return f"{row['family']}: promised is {family.state} {family.says!r}, found {row}"


if __name__ == "__main__":
    sys.exit(main())
