"""How long a snapshot and the events of a large tree hold the scheduler: one JSON row.

The tree is SGLang's own, filled through the events that a server sends; requests run in it. Every snapshot is checked
against counts that are taken from the tree's own pages. Of snapshots both clocks are read: what the thread computed
(`cpu`), which is bounded, and what passed on the wall, which holds what else the machine did meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from sglang_deltastore.host import activate

activate()  # before SGLang is imported

import numpy as np  # noqa: E402
from sglang.srt.mem_cache.base_prefix_cache import EvictParams  # noqa: E402

from benchmarks.provenance import provenance, write_rows  # noqa: E402
from benchmarks.scale.forest import PAGE_TOKENS, Forest  # noqa: E402
from sglang_deltastore.seam.facts import LiveFacts  # noqa: E402

SNAPSHOTS, MOST_MS = 200, 5.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--pages", type=int, default=1_000_000, help="default: %(default)s")
    parser.add_argument("--running", type=int, default=256, help="requests that run (default: %(default)s)")
    parser.add_argument("--turn-tokens", type=int, default=512, help="of a question and its answer")
    parser.add_argument("--turns", type=int, default=12, help="of a conversation; the tree is twice as deep")
    parser.add_argument("--json", type=Path, help="write the row here")
    args = parser.parse_args()
    row = {**measure(args), **provenance()}
    print(json.dumps(row))
    if args.json:
        write_rows(args.json, [row])
    if row["snapshot_cpu_ms_max"] > MOST_MS:
        print(f"a snapshot took {row['snapshot_cpu_ms_max']} ms; allowed are {MOST_MS}", file=sys.stderr)
        return 1
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    forest = Forest(args.pages, args.running, args.turn_tokens, args.turns)
    began = time.perf_counter()
    forest.fill(spare_pages=args.running * 2 * args.turn_tokens // PAGE_TOKENS)
    filled_s = time.perf_counter() - began
    requests_us = list(forest.event_us)
    for at in range(args.running):  # behind a system prompt, or a part of one: matches split nodes
        system = forest.systems[at % len(forest.systems)]
        forest.begin([*system[: len(system) - 64 * (at % 3)], *forest._text(args.turn_tokens // 2)])
    cpu_ms, wall_ms = snapshots(forest)
    depth = [len(forest.tree_cache._path(req.last_node)) for req in forest.running_batch.reqs]
    mirror = forest.tree_cache.mirror
    row = {
        "op": "snapshot", "pages": args.pages, "running": args.running, "nodes": len(mirror.nodes),
        "stored_tokens": mirror.stored_tokens, "running_depth_nodes": max(depth), "snapshots": len(cpu_ms),
        **spread("snapshot_cpu_ms", cpu_ms), **spread("snapshot_wall_ms", wall_ms),
        **spread("request_event_us", requests_us), "filled_s": round(filled_s, 1),
    }  # fmt: skip
    row |= spread("eviction_event_us", evictions(forest))
    row |= census(forest)
    return {**row, "checked": True}


def snapshots(forest: Forest) -> tuple[list[float], list[float]]:
    """Milliseconds of each, computed and passed, while requests end and others begin in between."""
    facts, cpu_ms, wall_ms = LiveFacts(forest), [], []
    for at in range(SNAPSHOTS):
        prompt = [*forest.systems[at % len(forest.systems)], *forest._text(64)]
        old = forest.running_batch.reqs[0]
        old.ended = True
        forest._checkpoint(old)
        forest._leave(old)
        forest.begin(prompt)
        began, computed = time.perf_counter(), time.thread_time()
        stats = facts.fresh()
        cpu_ms.append((time.thread_time() - computed) * 1e3)
        wall_ms.append((time.perf_counter() - began) * 1e3)
        check(forest, stats)
    return cpu_ms, wall_ms


def check(forest: Forest, stats: Any) -> None:
    """Raises RuntimeError where the facts are not the tree's."""
    wrong = [*stats.accounting_errors]
    if stats.untracked_tokens or stats.observation_errors:
        wrong.append(f"{stats.untracked_tokens} tokens untracked, {stats.observation_errors} failures")
    if stats.pages_in_nodes * PAGE_TOKENS != forest.tree_cache.mirror.stored_tokens:
        wrong.append("the mirror holds other tokens than the tree")
    if wrong:
        raise RuntimeError(f"the facts are not the tree's: {wrong}")


def evictions(forest: Forest) -> list[float]:
    """Microseconds that each evicted node costs beside SGLang's own work."""
    tree, taken_us = forest.tree_cache, []
    path_of, evicted = tree._path, tree.mirror.evicted

    def timed(node_id: int) -> Any:
        began = time.perf_counter()
        path = path_of(node_id)
        taken_us.append((time.perf_counter() - began) * 1e6)
        return path

    def timed_too(path: Any) -> None:
        began = time.perf_counter()
        evicted(path)
        taken_us[-1] += (time.perf_counter() - began) * 1e6

    tree._path, tree.mirror.evicted = timed, timed_too
    tree.evict(EvictParams(num_tokens=2000 * PAGE_TOKENS))
    del tree._path, tree.mirror.evicted
    return taken_us


def census(forest: Forest) -> dict[str, Any]:
    """Every page looked at, in slices, once nothing runs."""
    for req in list(forest.running_batch.reqs):
        req.ended = True
        forest._checkpoint(req)
        forest._leave(req)
    facts, slices_ms = LiveFacts(forest), []
    while facts._settled_version != forest.tree_cache.version:
        began = time.perf_counter()
        facts._look_on()
        slices_ms.append((time.perf_counter() - began) * 1e3)
    if errors := facts.fresh().accounting_errors:
        raise RuntimeError(f"pages are lost: {errors}")
    return {**spread("census_slice_ms", slices_ms), "census_ms": round(sum(slices_ms), 1)}


def spread(name: str, values: list[float]) -> dict[str, float]:
    p50, p99, most = np.percentile(values, [50, 99, 100])
    return {f"{name}_p50": round(p50, 3), f"{name}_p99": round(p99, 3), f"{name}_max": round(most, 3)}


if __name__ == "__main__":
    sys.exit(main())
