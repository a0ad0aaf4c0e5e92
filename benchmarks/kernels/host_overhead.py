"""What a decode step costs beside its arithmetic: python -m benchmarks.kernels.host_overhead [--against FOLDER]

Many requests with tiny contexts: planning, cutting work into threads' runs, and looking at indices are then most of
attend_decode. A step is one plan and LAYERS runs, as a server does it; --against names another deltastore_kernels
package that has plans, with its compiled library (of an older commit, say), and both take turns.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.kernels.timing import best_us
from benchmarks.kernels.workloads import Shape, random_context
from benchmarks.provenance import provenance, write_rows
from deltastore_kernels import ops
from deltastore_kernels.context import Scoring
from deltastore_kernels.layout import Format
from tests.kernels.paged_context import PagedContext

LAYERS = 80
REQUESTS = 256
#: (head_dim, KV heads, query heads for each)
MODELS = ((64, 3, 3), (128, 8, 4))


def package(folder: Path) -> ModuleType:
    """Another deltastore_kernels, under a name of its own."""
    name = "other_deltastore_kernels"
    for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == name]:
        del sys.modules[loaded]
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    for module in ("native", "context", "layout", "ops"):
        importlib.import_module(f"{name}.{module}")
    return sys.modules[name]


def theirs(context: PagedContext, other: ModuleType) -> tuple[Any, Any]:
    """A step and a layer for another package's kernels."""
    layout = context.layout
    fmt = other.layout.Format(layout.format.key_bits, layout.format.value_bits)
    own_layout = other.layout.PageLayout(fmt, layout.num_kv_heads, layout.head_dim, layout.page_tokens)
    # What is not there has a default, and another package may not know of it.
    step, layer = (
        {field.name: value for field in fields(part) if (value := getattr(part, field.name)) is not None}
        for part in (context.step, context.layer)
    )
    return other.context.StepContext(**step), other.context.LayerStore(**layer | {"layout": own_layout})


def step_of(operations: Any, query: torch.Tensor, step: Any, layer: Any, scoring: Any) -> Callable[[], Any]:
    """A step's attention, plan and all layers; gives the last layer's."""

    def attend() -> Any:
        plan = operations.plan_decode(step, layer)
        for _ in range(LAYERS):
            found = plan.run(query, layer, scoring)
        return found

    return attend


def measure(model: tuple[int, int, int], threads: int, rounds: int, other: ModuleType | None) -> dict[str, Any]:
    """One row: microseconds of a step's attention, all layers."""
    head_dim, kv_heads, gqa = model
    shape = Shape(Format(4, 2), head_dim, kv_heads, gqa, REQUESTS, 16, page_tokens=16)
    context, scale = random_context(shape, seed=0), head_dim**-0.5
    query = torch.randn(REQUESTS, kv_heads * gqa, head_dim)
    torch.set_num_threads(threads)
    contestants = {"us": step_of(ops.load("cpu"), query, context.step, context.layer, Scoring(scale))}
    if other is not None:
        their_step = step_of(other.ops.load("cpu"), query, *theirs(context, other), other.context.Scoring(scale))
        if not all(torch.equal(one, two) for one, two in zip(contestants["us"](), their_step(), strict=True)):
            raise SystemExit("the two libraries' answers differ; not timed")
        contestants["against_us"] = their_step
    row = {"head_dim": head_dim, "kv_heads": kv_heads, "gqa": gqa, "batch": REQUESTS, "layers": LAYERS}
    return row | {"threads": threads, "rounds": rounds} | best_us(contestants, rounds)


def measure_check(rounds: int) -> dict[str, Any]:
    """Microseconds of a plan, which looks at 256 contexts of 128K tokens: once a step, where it was once a layer."""
    shape = Shape(Format(4, 2), 64, 1, 1, REQUESTS, 16, page_tokens=16)
    entries = 8192
    context = replace(
        random_context(shape, seed=0),
        page_table=torch.zeros(REQUESTS, entries, dtype=torch.int64),
        packed_tokens=torch.full((REQUESTS,), entries * 16),
    )
    plan_decode, step, layer = ops.load("cpu").plan_decode, context.step, context.layer
    return {"batch": REQUESTS, "entries": REQUESTS * entries, "rounds": rounds} | best_us(
        {"check_us": lambda: plan_decode(step, layer)}, rounds
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.host_overhead", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 64], help="runs that work is cut into (2 64)")
    parser.add_argument("--rounds", type=int, default=7, help="every contestant keeps its best (default 7)")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another deltastore_kernels, compiled")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object a row")
    options = parser.parse_args()
    other = package(options.against.resolve()) if options.against else None
    facts = provenance()
    rows = [measure(model, threads, options.rounds, other) | facts for model in MODELS for threads in options.threads]
    checks = measure_check(options.rounds)
    if options.json:
        write_rows(options.json, [*rows, checks | facts])
    table = Table("requests", "heads x gqa x dim", "threads", f"us a step of {LAYERS} layers", "against")
    for row in rows:
        heads = f"{row['kv_heads']} x {row['gqa']} x {row['head_dim']}"
        against = f"{row['against_us']:.0f}" if "against_us" in row else ""
        table.add_row(str(REQUESTS), heads, str(row["threads"]), f"{row['us']:.0f}", against)
    console = Console(width=120)
    console.print(table)
    console.print(f"one look at {checks['entries']:,} page table entries: {checks['check_us']:.0f} us")
    console.print(f"{facts['machine']}, {facts['cores']} cores, {facts['versions']}, commit {facts['commit']}")


if __name__ == "__main__":
    main()
