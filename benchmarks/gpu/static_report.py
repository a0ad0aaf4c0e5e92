"""What the GPU kernels cost, from their machine code: needs a CUDA compiler and no GPU.

For each kernel, format, head_dim and architecture: registers, memory, occupancy, the instructions of the main loop for
each token and KV head (all of the loop's, also those for first and last blocks, soft caps and raised maxima), and the
time that memory, instruction issue and pipes allow at best, beside the time that reading bf16 or fp8 keys and values
takes. Nothing here was run on a GPU.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.gpu import step
from benchmarks.gpu.compiled import ARCHITECTURES, Architecture, Compiled, compile_cuda, kernels_of
from benchmarks.gpu.roofline import GPUS, bounds, bytes_per_token, memory_us
from benchmarks.gpu.sass import longest_loop, main_loop
from benchmarks.provenance import provenance, write_rows
from deltastore_kernels.cuda_build import FORMATS, HEAD_DIMS, Kernels
from deltastore_kernels.layout import RAW, Format, PageLayout

CUDA_WARPS = 4
CUDA_GQA = "1-8"  # one kernel: eight columns of a product, used or not
PACKED_TOKENS_PER_LOOP, RAW_TOKENS_PER_LOOP = 64, 16
QUICK = [(Format(4, 2), 128), (Format(3, 2), 128), (RAW, 128)]
PAGE_TOKENS, KV_HEADS = 64, 8


def describe(
    kernel: str,
    compiled: Compiled,
    architecture: Architecture,
    fmt: Format,
    head_dim: int,
    gqa: str,
    warps: int,
    tokens_per_loop: int,
    sharing_warps: int = 1,
) -> dict[str, Any]:
    """One row. `sharing_warps` go through the loop together for its tokens."""
    tokens_per_warp = tokens_per_loop / sharing_warps
    loop, gpu = main_loop(compiled.sass), GPUS[architecture.name]
    stored_bytes = bytes_per_token(PageLayout(fmt, KV_HEADS, head_dim, PAGE_TOKENS))
    limits = bounds(gpu, loop, tokens_per_warp, stored_bytes)
    bf16_us = memory_us(gpu, 4 * head_dim)
    return {
        "kernel": kernel,
        "format": str(fmt),
        "head_dim": head_dim,
        "gqa": gqa,
        "arch": architecture.name,
        "registers": compiled.registers,
        "local_instructions": compiled.local_instructions,
        "stack_bytes": compiled.stack_bytes,
        "shared_bytes": compiled.shared_bytes,
        "warps": warps,
        "occupancy_blocks": architecture.occupancy_blocks(compiled.registers, compiled.shared_bytes, warps),
        "tokens_per_loop": tokens_per_loop,
        "instructions": len(loop.instructions) / tokens_per_warp,
        "classes": {name: count / tokens_per_warp for name, count in sorted(loop.classes().items())},
        "bytes": stored_bytes,
        "roofline": asdict(limits) | {"us": limits.us, "limit": limits.limit, "gpu": gpu.name},
        "bf16_us": bf16_us,
        "fp8_us": bf16_us / 2,
    }


def cuda_row(fmt: Format, head_dim: int, architecture: Architecture) -> dict[str, Any]:
    compiled = kernels_of(compile_cuda(Kernels(fmt, head_dim), architecture), architecture)["deltastore_attend_decode"]
    tokens = RAW_TOKENS_PER_LOOP if fmt.is_raw else PACKED_TOKENS_PER_LOOP
    return describe("cuda attend_decode", compiled, architecture, fmt, head_dim, CUDA_GQA, CUDA_WARPS, tokens)


def cuda_jobs(quick: bool) -> Iterator[tuple[Format, int, Architecture]]:
    points = QUICK if quick else product(FORMATS, HEAD_DIMS)
    for (fmt, head_dim), name in product(points, ["sm_90"] if quick else ARCHITECTURES):
        yield fmt, head_dim, ARCHITECTURES[name]


def triton_rows(quick: bool) -> Iterator[dict[str, Any]]:
    """The Triton decode kernel for groups of four, on sm_90; others serve several requests or other GPUs."""
    from deltastore_kernels.ops import _triton_aot

    formats = {str(fmt): fmt for fmt in FORMATS}
    architecture = ARCHITECTURES["sm_90"]
    for instantiation in _triton_aot.a_few() if quick else _triton_aot.everything():
        found = re.fullmatch(r"attend_own (\S+) D=(\d+) GQA=4", instantiation.name)
        if not found or int(found[2]) not in HEAD_DIMS:
            continue
        kernel = _triton_aot.compile_for(instantiation, _triton_aot.TARGETS[architecture.name])
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(kernel.asm["cubin"])
            (compiled,) = kernels_of(Path(file.name), architecture).values()
        compiled = replace(compiled, shared_bytes=kernel.metadata.shared)  # asked for at launch
        fmt, head_dim, warps = formats[found[1]], int(found[2]), kernel.metadata.num_warps
        tokens = instantiation.tokens_per_loop
        yield describe("triton attend_decode", compiled, architecture, fmt, head_dim, "4", warps, tokens, warps)


def cells(row: dict[str, Any]) -> list[str]:
    classes, limits = row["classes"], row["roofline"]
    names = ("tensor", "LDG", "LDS/STS", "PRMT", "LOP3", "SHF", "IMAD", "FP32", "MUFU", "convert", "shuffle")
    return [
        row["kernel"], row["format"], str(row["head_dim"]), row["gqa"], row["arch"], str(row["registers"]),
        str(row["local_instructions"]), str(row["shared_bytes"]), str(row["occupancy_blocks"]),
        str(row["tokens_per_loop"]), f"{row['instructions']:.1f}",
        *(f"{classes.get(name, 0):.2f}" for name in names), f"{row['bytes']:.1f}", f"{limits['us']:.0f}",
        limits["limit"], f"{row['bf16_us']:.0f}", f"{row['fp8_us']:.0f}", f"{row['bf16_us'] / limits['us']:.1f}",
    ]  # fmt: skip


COLUMNS = [
    "kernel", "format", "D", "GQA", "arch", "regs", "local", "shared", "blocks/SM", "tokens/loop", "instr",
    "tensor", "LDG", "LDS", "PRMT", "LOP3", "SHF", "IMAD", "FP32", "MUFU", "conv", "shfl", "bytes", "best us", "limit",
    "bf16 us", "fp8 us", "x of bf16",
]  # fmt: skip

NOTES = """\
instr and the classes after it: warp instructions of the main loop for each (token, KV head). local: instructions that
touch local memory (spills). best us: the largest of the times that memory, instruction issue, the ALU pipe, special
functions and tensor cores need at their peak rates for one layer of Llama 3 8B's shape (8 KV heads), batch 64, 8,192
tokens; bf16 us, fp8 us: merely reading keys and values of those types. sm_80 is an A100 SXM 80 GB, sm_90 an H100 SXM.
A lower bound: nothing here was run on a GPU."""


def markdown(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    made = f"`python -m benchmarks.gpu.static_report`, commit {facts['commit'] or 'unknown'}, {facts['date']}"
    return f"# GPU kernels, from their machine code\n\n{NOTES}\n\n{made}.\n\n{pipes(COLUMNS, map(cells, rows))}"


STEP_COLUMNS = [
    "model", "batch", "context", "format", "kernels a layer", "once", "attention ms", "shaping ms", "all else ms",
    "step ms",
    "stock bf16 ms", "stock fp8 ms", "x of bf16", "x of fp8",
]  # fmt: skip

STEP_NOTES = f"""\
A calculation: nothing here was run on a GPU. The attention side of one decode step on an H100 SXM, one GPU's share,
page tables for {step.TABLE_TOKENS:,} tokens: every kernel that DeltaStore launches, as counted on the product's own
Python, takes what its bytes take at peak memory rate, attention what its instructions take where that is more, none
less than {step.SMALL_KERNEL_US:g} us. Keys are calibrated: shaping is the way of completed tiles' keys through their
dims, one after the other, by the instructions of the Triton kernel's loop, on average over steps; without calibration
there is none. Stock is credited with two kernels a layer, attention and the write of new keys and values, at peak
memory rate. Weights' products are the same on both sides, and left out. The largest cells are more than one GPU holds.
once: kernels of a step that are the same for all layers."""


def step_cells(row: dict[str, Any]) -> list[str]:
    rest = row["us"] - row["attention_us"] - row["shaping_us"]
    times = (row["attention_us"], row["shaping_us"], rest, row["us"], row["stock_bf16_us"], row["stock_fp8_us"])
    return [
        row["model"], str(row["batch"]), f"{row['context_tokens']:,}", row["format"], str(row["kernels_a_layer"]),
        str(row["kernels_once"]), *(f"{us / 1e3:.2f}" for us in times), f"{row['x_of_bf16']:.2f}",
        f"{row['x_of_fp8']:.2f}",
    ]  # fmt: skip


def kernels_of_a_layer(row: dict[str, Any]) -> list[list[str]]:
    return [[each["kernel"], f"{each['bytes']:,.0f}", f"{each['us']:.1f}"] for each in row["layer"]]


def step_markdown(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    made = f"`python -m benchmarks.gpu.static_report --step`, commit {facts['commit'] or 'unknown'}, {facts['date']}"
    shown = next(row for row in rows if (row["batch"], row["context_tokens"]) == (32, 16384))
    what = f"{shown['model']}, batch 32, 16,384 tokens, {shown['format']}"
    return (
        f"# A decode step, calculated\n\n{STEP_NOTES}\n\n{made}.\n\n{pipes(STEP_COLUMNS, map(step_cells, rows))}\n"
        f"## The kernels of a layer: {what}\n\nBytes of attention without those of the context.\n\n"
        f"{pipes(['kernel', 'bytes', 'us'], kernels_of_a_layer(shown))}"
    )


def pipes(columns: list[str], lines: Iterable[list[str]]) -> str:
    """A Markdown table."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (columns, ["---"] * len(columns), *lines))


def report_step(file: Path | None) -> None:
    facts = provenance()

    def attention_row(fmt: Format, head_dim: int) -> dict[str, Any]:
        return cuda_row(fmt, head_dim, ARCHITECTURES[step.ARCHITECTURE])

    rows = [row | facts for row in step.rows(attention_row, shaping_loop)]
    publish(rows, file, step_markdown(rows, facts), STEP_COLUMNS, step_cells, STEP_NOTES, width=160)


@cache
def shaping_loop(fmt: Format, head_dim: int) -> step.ShapingLoop:
    from deltastore_kernels.ops import _triton_aot

    found, target = {}, _triton_aot.TARGETS[step.ARCHITECTURE]
    for own in (4, 16):
        kernel = _triton_aot.compile_for(_triton_aot.store_rows(fmt, head_dim, True, OWN=own), target)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(kernel.asm["cubin"])
            (compiled,) = kernels_of(Path(file.name), ARCHITECTURES[step.ARCHITECTURE]).values()
        found[own] = len(longest_loop(compiled.sass).instructions)
    return found


def publish(
    rows: list[dict[str, Any]],
    file: Path | None,
    page: str,
    columns: Sequence[str],
    cells_of: Callable[[dict[str, Any]], Sequence[str]],
    notes: str,
    width: int,
) -> None:
    """Rows into the file with a page beside it, where there is to be one, and as a table on the screen."""
    if file:
        write_rows(file, rows)
        file.with_suffix(".md").write_text(page)
    table = Table(*columns)
    for row in rows:
        table.add_row(*cells_of(row))
    console = Console(width=width)
    console.print(table)
    console.print(notes)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.static_report", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="head_dim 128 on sm_90 alone: K4V2, K3V2, raw")
    parser.add_argument("--json", type=Path, metavar="FILE", help="one JSON object a row, and FILE's .md beside it")
    parser.add_argument("--no-triton", action="store_true", help="the CUDA kernels alone")
    parser.add_argument("--step", action="store_true", help="a whole decode step of three models beside stock's")
    arguments = parser.parse_args()
    if arguments.step:
        return report_step(arguments.json)
    facts = provenance()
    rows = [cuda_row(*job) | facts for job in tqdm(list(cuda_jobs(arguments.quick)), unit="kernel", desc="CUDA")]
    if not arguments.no_triton:
        rows += [row | facts for row in tqdm(triton_rows(arguments.quick), unit="kernel", desc="Triton")]
    publish(rows, arguments.json, markdown(rows, facts), COLUMNS, cells, NOTES, width=260)


if __name__ == "__main__":
    main()
