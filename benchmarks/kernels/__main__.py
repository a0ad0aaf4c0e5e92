"""Times the CPU kernels: python -m benchmarks.kernels [--quick] [--json FILE] [--plot FILE]

Each row is one operation on one shape. Times are the best of several rounds in which our kernel and its
baselines take turns, and with them a plain read of memory on as many threads. Its bandwidth says how long the
row's packed bytes, and its tokens' bytes as fp16, take merely to read: no attention over fp16 KV from memory
can be faster than the latter.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.kernels import workloads
from benchmarks.kernels.timing import CLOCKS, READ_BYTES, best_us, reader
from benchmarks.kernels.workloads import Shape
from benchmarks.provenance import provenance, write_rows
from deltastore_kernels import native
from deltastore_kernels.layout import RAW, Format

#: (head_dim, KV heads, query heads for each): SmolLM2-135M; Llama-3.2-3B and Qwen3-4B have 8 KV heads of 128
SMALL, LARGE = (64, 3, 3), (128, 8, 4)
K4V2, K3V2, K4V3, K4V4 = Format(4, 2), Format(3, 2), Format(4, 3), Format(4, 4)
#: stored and new tokens
EXTENDS = ((8192, 512), (4096, 32), (256, 1024), (4096, 1024), (0, 2048))
#: longer contexts as float32, several times over, would need more memory than small machines have
MOST_FLOAT_TOKENS = 32768


@dataclass(frozen=True)
class Job:
    op: str
    shape: Shape
    threads: int
    isa: str
    new_tokens: int = 0
    baselines: bool = True

    def contestants(self) -> workloads.Contestants:
        if self.op == "attend_decode":
            return workloads.decode_contestants(self.shape, cold=self.shape.context >= 1024, baselines=self.baselines)
        if self.op == "attend_extend":
            return workloads.extend_contestants(self.shape, self.new_tokens)
        if self.op == "attend_decode of two levels":
            return workloads.levels_contestants(self.shape, K3V2)
        make = {
            "encode": workloads.encode_contestants,
            "decode": workloads.unpack_contestants,
            "rotate": workloads.rotate_contestants,
        }
        return make[self.op](self.shape)


def decode_job(
    fmt: Format, model: tuple[int, int, int], context: int, threads: int, isa: str, batch: int = 1, **options: bool
) -> Job:
    return Job("attend_decode", Shape(fmt, *model, batch=batch, context=context), threads, isa, **options)


def jobs(quick: bool, threads: list[int]) -> Iterator[Job]:
    best, *others = native.isas()
    for count in threads:
        yield from (quick_jobs if quick else all_jobs)(count, best)
        for op, model in product(("encode", "decode", "rotate"), (SMALL, LARGE)):
            yield Job(op, Shape(K4V2, *model, 1, 4096), count, best)
    for isa in (best, *others):
        shape = Shape(K4V3, *SMALL, batch=1, context=8192, page_tokens=16)
        yield Job("attend_decode of two levels", shape, 1, isa)
    for isa in others:
        yield decode_job(K4V2, LARGE, 4096 if isa == "portable" else 32768, 1, isa, baselines=False)
        if isa != "portable":
            yield Job("attend_extend", Shape(K4V2, *SMALL, 1, 8192), 1, isa, new_tokens=512)


def quick_jobs(threads: int, isa: str) -> Iterator[Job]:
    for fmt, model in product((K4V2, K3V2), (LARGE, SMALL)):
        yield decode_job(fmt, model, 32768, threads, isa, baselines=fmt == K4V2)
    for context in (2048, 8192):
        yield decode_job(K4V2, LARGE, context, threads, isa)
    for fmt, model, (stored, new) in product((K4V2, RAW), (SMALL, LARGE), ((8192, 512), (0, 2048))):
        if stored or fmt == K4V2:
            yield Job("attend_extend", Shape(fmt, *model, 1, stored), threads, isa, new_tokens=new)


def all_jobs(threads: int, isa: str) -> Iterator[Job]:
    contexts = (1024, 4096, 8192, 16384, 32768, 65536, 131072)
    for context, model, fmt in product(contexts, (LARGE, SMALL), (K4V2, K3V2, K4V3, K4V4)):
        yield decode_job(fmt, model, context, threads, isa, baselines=fmt == K4V2 and context <= MOST_FLOAT_TOKENS)
    for batch, model in product((8, 32), (LARGE, SMALL)):
        yield decode_job(K4V2, model, 2048, threads, isa, batch=batch)
    for heads, gqa in ((8, 1), (8, 8)):
        yield decode_job(K4V2, (128, heads, gqa), 32768, threads, isa)
    for fmt, model, (stored, new) in product((K4V2, K3V2, RAW), (SMALL, LARGE), EXTENDS):
        yield Job("attend_extend", Shape(fmt, *model, 1, stored), threads, isa, new_tokens=new)


def measure(job: Job, rounds: int, clock: str) -> dict[str, Any]:
    """One row."""
    torch.set_num_threads(job.threads)
    native.use_isa(job.isa)
    shape = job.shape
    times = best_us(job.contestants() | {"read_us": reader()}, rounds, clock)
    bandwidth = READ_BYTES / times.pop("read_us")  # bytes a microsecond
    row = {
        "op": job.op,
        "format": str(shape.fmt),
        "head_dim": shape.head_dim,
        "kv_heads": shape.kv_heads,
        "gqa": shape.gqa,
        "batch": shape.batch,
        "context": shape.context,
        "new_tokens": job.new_tokens,
        "threads": job.threads,
        "isa": job.isa,
        "us": times.pop("us"),
        "packed_read_us": shape.packed_bytes / bandwidth,
        "fp16_read_us": shape.fp16_bytes / bandwidth,
        "baselines_us": {name.removesuffix("_us"): value for name, value in times.items()},
        "checked": True,
        "rounds": rounds,
        "clock": clock,
        "read_gbps": bandwidth / 1e3,
        "load_average": os.getloadavg()[0],
    }
    if job.op == "attend_decode":
        row["ns_per_token_and_head"] = row["us"] * 1e3 / (shape.batch * shape.context * shape.kv_heads)
    return row


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table("op", "format", "shape", "context", "threads", "isa", "us", "ns/(token, head)", "fp16 read us",
                  "x of fp16 read", "x of packed read", "baselines us")  # fmt: skip
    for row in rows:
        attends = row["op"] == "attend_decode"
        tokens = f"{row['context']}+{row['new_tokens']}" if row["new_tokens"] else str(row["context"])
        table.add_row(
            row["op"], row["format"], f"{row['batch']} x {row['kv_heads']} x {row['gqa']} x {row['head_dim']}", tokens,
            str(row["threads"]), row["isa"], f"{row['us']:.0f}",
            f"{row['ns_per_token_and_head']:.1f}" if attends else "",
            f"{row['fp16_read_us']:.0f}" if attends else "",
            f"{row['us'] / row['fp16_read_us']:.2f}" if attends else "",
            f"{row['us'] / row['packed_read_us']:.2f}" if attends else "",
            "  ".join(f"{name} {us:.0f}" for name, us in row["baselines_us"].items()),
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the figures that matter most, about two minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object a row")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw decode time against context (PNG or SVG)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1], help="default: 1 and all")
    parser.add_argument("--rounds", type=int, default=5, help="every contestant keeps its best (default 5)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: the thread's own time; with --threads 1")
    arguments = parser.parse_args()
    if arguments.clock == "cpu" and arguments.threads != [1]:
        parser.error("--clock cpu sees one thread only: add --threads 1")

    facts, rows = provenance(), []
    for job in tqdm(list(jobs(arguments.quick, sorted(set(arguments.threads)))), unit="row"):
        rows.append(measure(job, arguments.rounds, arguments.clock) | facts)
        if arguments.json:
            write_rows(arguments.json, rows)
    console = Console(width=200)
    console.print(table_of(rows))
    console.print(f"{facts['machine']}, {facts['cores']} cores, {facts['versions']}, commit {facts['commit']}")
    console.print("Not compared here: llama.cpp. Its whole-model time per token comes from its own llama-bench.")
    if arguments.plot:
        from benchmarks.kernels.plot import context_plot  # matplotlib is a development dependency

        context_plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
