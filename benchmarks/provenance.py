"""Rows of results, and where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sglang_deltastore.lab.provenance import provenance

__all__ = ["RESULTS", "ROOT", "provenance", "write_rows"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
