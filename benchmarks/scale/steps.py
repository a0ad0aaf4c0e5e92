"""What a step costs the host at scale, on the CPU: 256 requests in 80 layers, and sequences that find no free sink.

    decode_host      a decode step of 256 requests, planned and run through 80 layers whose kernels do nothing: what
                     is left is Python, and torch's operations on the batch's own rows
    sinks_exhausted  the plan of a step that begins a sequence for which another loses its sink, in 1,200,000 pages

With `--against FOLDER` another checkout is measured in the same run, the two in turns, each in its own process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from deltastore_kernels import ops
from deltastore_kernels.context import Scoring
from deltastore_kernels.layout import Format, PageLayout
from sglang_deltastore.store import steps
from sglang_deltastore.store.pages import PageStore
from sglang_deltastore.store.size import StoreSize

ROOT = Path(__file__).resolve().parents[2]
REQUESTS, LAYERS, CONTEXT_TOKENS, PAGE_TOKENS = 256, 80, 1024, 16
HEADS, GROUP, HEAD_DIM = 1, 8, 128
"""Of one rank of eight of a 70B model."""
PAGES = 1_200_000
_CHILD = "--child"


def main() -> int:
    arguments = _parser().parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.steps)))
        return 0
    from benchmarks.checkout import environ_of
    from benchmarks.provenance import provenance, write_rows
    from sglang_deltastore.lab.provenance import commit_of

    sides = {"now": (ROOT, _own_environ())}
    if there := arguments.against:
        sides[commit_of(there) or str(there)] = (there, environ_of(there))
    found: dict[tuple[str, str], list[float]] = {}
    for _ in tqdm(range(arguments.rounds), unit="round", file=sys.stderr):
        for side, (checkout, environ) in sides.items():
            for what, milliseconds in _child(arguments.steps, checkout, environ).items():
                found.setdefault((what, side), []).append(milliseconds)
    rows = [
        {
            "benchmark": "scale", "what": what, "side": side, "unit": "ms", "median": statistics.median(values),
            "least": min(values), "most": max(values), "rounds": len(values), "requests": REQUESTS, "layers": LAYERS,
            "pages": PAGES, **provenance(),
        }
        for (what, side), values in found.items()
    ]  # fmt: skip
    if arguments.json:
        write_rows(arguments.json, rows)
    table = Table("what", "side", "ms", "least", "most")
    for row in rows:
        table.add_row(row["what"], row["side"], *(f"{row[name]:.3f}" for name in ("median", "least", "most")))
    Console().print(table)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale.steps", description=__doc__.split("\n")[0])
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout, its kernels compiled")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="steps of a round (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON row a line")
    parser.add_argument(_CHILD, action="store_true", help=argparse.SUPPRESS)
    return parser


def _child(num_steps: int, checkout: Path, environ: dict[str, str]) -> dict[str, float]:
    """What a checkout's own `measure` says, in a process of its own: modules may lie elsewhere there."""
    command = [sys.executable, str(checkout / Path(__file__).relative_to(ROOT)), _CHILD, "--steps", str(num_steps)]
    found = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"measuring failed:\n{found.stderr}")
    return json.loads(found.stdout.splitlines()[-1])


def _own_environ() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "PYTHONSAFEPATH": "1"}


def measure(num_steps: int) -> dict[str, float]:
    """Milliseconds of a step, the median of `num_steps`, by what was measured."""
    return {"decode_host": _decode_host(num_steps), "sinks_exhausted": _sinks_exhausted(num_steps)}


def idle_kernels() -> ops.Operations:
    """Operations that return at once."""
    real = ops.load("cpu")
    plan = SimpleNamespace(run=lambda query_rot, *_args: (query_rot, None))
    return replace(real, rotate=lambda x: x, encode=lambda *_args: None, plan_decode=lambda *_args: plan)


def _decode_host(num_steps: int) -> float:
    layout = PageLayout(Format(4, 2), HEADS, HEAD_DIM, PAGE_TOKENS)
    pages = REQUESTS * CONTEXT_TOKENS // PAGE_TOKENS
    store = PageStore(StoreSize((layout,) * LAYERS, REQUESTS, CONTEXT_TOKENS), pages, "cpu", idle_kernels())
    slots = (PAGE_TOKENS + torch.arange(REQUESTS * CONTEXT_TOKENS, dtype=torch.int32)).view(REQUESTS, CONTEXT_TOKENS)
    req_to_token = torch.cat((torch.zeros(1, CONTEXT_TOKENS, dtype=torch.int32), slots))
    rows = 1 + torch.arange(REQUESTS)
    query = torch.randn(REQUESTS, HEADS * GROUP, HEAD_DIM).bfloat16()
    key, value = (torch.randn(REQUESTS, HEADS, HEAD_DIM).bfloat16() for _ in "kv")
    lengths = CONTEXT_TOKENS // 2 + torch.arange(REQUESTS) % PAGE_TOKENS  # some complete a tile in every step

    def step(number: int) -> None:
        total = lengths + number
        plan = steps.plan_decode(store, req_to_token, rows, total)
        for layer in range(LAYERS):
            steps.decode(store, layer, query, key, value, plan, Scoring(0.1))

    return _median_ms(step, num_steps)


def _sinks_exhausted(num_steps: int) -> float:
    layout = PageLayout(Format(4, 2), 1, 32, PAGE_TOKENS)
    store = PageStore(StoreSize((layout,), 8, CONTEXT_TOKENS), PAGES, "cpu", idle_kernels())
    table, one = store.sink_table, torch.tensor([1])

    def step(number: int) -> None:
        table.hold({1: number})
        first = torch.full((1, CONTEXT_TOKENS), (PAGES - number) * PAGE_TOKENS, dtype=torch.int32)
        steps.plan_extend(store, first.expand(2, -1), one, [1], 0 * one, 16 * one)
        table.cache(number)
        table.release(1)

    for number in range(table.total):
        step(-1 - number)
    assert not table.free, "a stored sequence begins with each sink's token"
    return _median_ms(step, num_steps)


def _median_ms(step: Callable[[int], Any], num_steps: int) -> float:
    step(0)
    times = []
    for number in range(1, num_steps + 1):
        begin = time.perf_counter()
        step(number)
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1000


if __name__ == "__main__":
    sys.exit(main())
