"""Where SGLang is installed: whole servers, ours beside stock, by the serving benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.machine import Absent, Machine
from benchmarks.gpu.pieces import Piece

NEEDED = ("sglang", "requests", "rich", "tqdm", "gguf")


def pieces(machine: Machine) -> list[Piece]:
    return [Piece("latency of the embedded model", latency)]


def latency(machine: Machine) -> dict[str, Any]:
    """Every answer's length and cached tokens are checked there (benchmarks/serving/latency.py)."""
    if missing := [package for package in NEEDED if find_spec(package) is None]:
        raise Absent(f"not installed: {', '.join(missing)}")
    if machine.rehearsed:
        raise Absent("a rehearsal starts no servers; make test does, on the CPU")
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        command = [sys.executable, "-m", "benchmarks.serving.latency", "--device", "cuda", "--quick", "--json", rows]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr[-2000:]}")
        found = [json.loads(line) for line in rows.read_text().splitlines()]
    named = {f"{row['side']}, {row['context_tokens']} tokens, {row['metric']}": row for row in found}
    return {"medians": {name: f"{row['median']:.4g} {row['unit']}" for name, row in named.items()}}
