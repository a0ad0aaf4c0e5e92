"""Decode attention on a GPU: our CUDA and Triton kernels over packed pages, FlashInfer over bf16 and fp8 pages.

Equal contexts, one layer. Every contestant's answer is checked before it is timed, ours against the definition
(ops/attend_decode/reference.py), FlashInfer's against attention over the very numbers it was given; a figure whose
answer was wrong is not printed. Times are medians of CUDA events around a graph's replays, with L2 flushed before each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.roofline import GPUS, memory_us
from benchmarks.gpu.static_report import bytes_per_token
from benchmarks.provenance import provenance, write_rows
from deltastore_kernels.context import Scoring
from deltastore_kernels.layout import Format, PageLayout
from deltastore_kernels.ops.attend_decode import reference
from deltastore_kernels.ops.decode.reference import decode as decode_definition
from tests.kernels.paged_context import PagedContext, run_decode

PAGE_TOKENS = 64
L2_BYTES = 256 << 20
REPEATS = 50
#: relative RMS of all outputs: ours round to 15 bits and bfloat16 outputs (2^-9); FlashInfer's fp8 queries stay bf16
LARGEST_ERROR = 8e-3

Attend = Callable[[], torch.Tensor]


class WrongAnswer(RuntimeError):
    """A kernel gave something else than its definition."""


@dataclass(frozen=True)
class Shape:
    batch: int
    context_tokens: int
    kv_heads: int
    gqa: int
    head_dim: int

    @property
    def pages(self) -> int:
        return self.batch * self.context_tokens // PAGE_TOKENS

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.head_dim**-0.5)


def packed_context(shape: Shape, fmt: Format, device: str) -> PagedContext:
    """Pages of random codes: valid for every format, and no encoding of gigabytes. Scales are near one."""
    layout = PageLayout(fmt, shape.kv_heads, shape.head_dim, PAGE_TOKENS)
    generator = torch.Generator(device).manual_seed(1)
    pages = torch.randint(
        0, 256, (shape.pages, layout.page_bytes), dtype=torch.uint8, device=device, generator=generator
    )
    if fmt.is_raw:
        halves = torch.randn(shape.pages, layout.page_bytes // 2, device=device, generator=generator)
        pages = halves.to(torch.float16).view(torch.uint8)
    else:
        offset, tile_bytes = layout.field_offsets_bytes["anchors"]
        pages[:, offset : offset + tile_bytes * layout.num_kv_heads * layout.tiles] = 168  # two, before the nibbles
    table = torch.randperm(shape.pages, device=device, generator=generator).int().view(shape.batch, -1)
    full = torch.full((shape.batch,), shape.context_tokens, dtype=torch.int32, device=device)
    frames = torch.zeros(1, shape.kv_heads, 16, shape.head_dim, dtype=torch.float16, device=device)
    none = torch.zeros_like(full)
    return PagedContext(layout, pages, table, full, frames, frames.clone(), none, none)


def check(got: torch.Tensor, want: torch.Tensor, who: str) -> None:
    error = float(((got.float() - want.float()).square().sum() / want.float().square().sum()).sqrt())
    if not error <= LARGEST_ERROR:
        raise WrongAnswer(f"{who}: relative error {error:.2e}, allowed {LARGEST_ERROR:.0e}; not timed")


def ours(shape: Shape, fmt: Format, query: torch.Tensor) -> Iterator[tuple[str, Attend, torch.Tensor]]:
    from deltastore_kernels.ops.attend_decode import cuda, triton

    context = packed_context(shape, fmt, query.device.type)
    want, _ = run_decode(reference, query.float(), context, shape.scoring)
    for name, module in (("cuda", cuda), ("triton", triton)):
        plan, layer = module.DecodePlan(context.step), context.layer  # a step plans once for all its layers
        yield name, lambda plan=plan, layer=layer: plan.run(query, layer, shape.scoring)[0], want


def flashinfer_contestants(shape: Shape, query: torch.Tensor) -> Iterator[tuple[str, Attend, torch.Tensor, int]]:
    """bf16 and fp8 pages of the numbers that a K4V4 context decodes to. Last: bytes of a key or value."""
    import flashinfer

    context = packed_context(shape, Format(4, 4), query.device.type)
    for dtype, element_bytes in ((torch.bfloat16, 2), (torch.float8_e4m3fn, 1)):
        sides = decode_definition(context.pages, torch.arange(shape.pages, device=query.device), context.layout)
        pages = torch.stack([side.transpose(1, 2) for side in sides], dim=1).to(dtype)  # [pages, 2, P, H, D]
        want = query.new_empty(query.shape, dtype=torch.float32)
        for request in range(shape.batch):
            keys, values = pages[context.page_table[request].long()].float().unbind(1)
            keys, values = (side.flatten(0, 1).repeat_interleave(shape.gqa, dim=1) for side in (keys, values))
            scores = torch.einsum("hd,nhd->hn", query[request].float(), keys) * shape.scoring.scale
            want[request] = torch.einsum("hn,nhd->hd", scores.softmax(-1), values)
        workspace = torch.empty(128 << 20, dtype=torch.uint8, device=query.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=shape.gqa > 1)
        per_request = shape.context_tokens // PAGE_TOKENS
        indptr = torch.arange(0, shape.pages + 1, per_request, dtype=torch.int32)
        last = torch.full((shape.batch,), PAGE_TOKENS, dtype=torch.int32)
        heads = shape.kv_heads * shape.gqa, shape.kv_heads, shape.head_dim, PAGE_TOKENS
        indices = context.page_table.flatten()
        wrapper.plan(indptr, indices, last, *heads, q_data_type=query.dtype, kv_data_type=dtype)
        name = str(dtype).removeprefix("torch.")
        yield f"flashinfer {name}", lambda wrapper=wrapper, pages=pages: wrapper.run(query, pages), want, element_bytes


def time_us(attend: Attend) -> float:
    """Median of a graph's replays: what a server's step has, without Python."""
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")
    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    times = []
    for _ in range(REPEATS):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return median(times)


def measure(shape: Shape, formats: list[Format], device: str = "cuda") -> Iterator[dict[str, Any]]:
    """Rows, FlashInfer's bf16 first. Raises WrongAnswer."""
    generator = torch.Generator(device).manual_seed(2)
    query_shape = shape.batch, shape.kv_heads * shape.gqa, shape.head_dim
    query = torch.randn(query_shape, device=device, generator=generator).to(torch.bfloat16)
    contestants = [(name, attend, want, 2 * shape.head_dim * size, "") for name, attend, want, size in
                   flashinfer_contestants(shape, query)]  # fmt: skip
    for fmt in formats:
        per_token = bytes_per_token(fmt, shape.head_dim)
        contestants += [(name, attend, want, per_token, str(fmt)) for name, attend, want in ours(shape, fmt, query)]
    bf16_us = None
    tokens = shape.batch * shape.context_tokens * shape.kv_heads
    for name, attend, want, per_token, fmt in contestants:
        check(attend(), want, f"{name} {fmt}")
        us = time_us(attend)
        bf16_us = bf16_us or us  # FlashInfer's bf16 comes first
        gigabytes_a_second = per_token * tokens / us / 1e3
        yield {"op": "attend_decode", "kernel": name, "format": fmt, **vars(shape), "us": us, "checked": True,
               "bytes": per_token * tokens, "gbps": gigabytes_a_second, "x_of_flashinfer_bf16": bf16_us / us,
               "clock": f"CUDA events around a graph, median of {REPEATS}, L2 flushed"}  # fmt: skip


def shapes(quick: bool) -> list[Shape]:
    """Llama 3 8B's heads, and Qwen3 8B's at batch one; head_dim 64; groups of eight."""
    first = Shape(64, 8192, 8, 4, 128)
    more = [
        Shape(1, 32768, 8, 4, 128),
        Shape(16, 2048, 8, 4, 128),
        Shape(32, 8192, 8, 4, 64),
        Shape(32, 8192, 8, 8, 128),
    ]
    return [first] if quick else [first, *more]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.decode", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape: batch 64, 8,192 tokens, K4V2 and K3V2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object a row")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu.decode: no NVIDIA GPU (torch.cuda.is_available() is False). What can be said without "
              "one: python -m benchmarks.gpu.static_report", file=sys.stderr)  # fmt: skip
        return 1
    formats = [Format(4, 2), Format(3, 2)] + ([] if arguments.quick else [Format(4, 3), Format(4, 4)])
    facts, rows = provenance("cuda"), []
    for shape in shapes(arguments.quick):
        for row in measure(shape, formats):
            rows.append(row | facts)
            print(f"{row['kernel']:28} {row['format']:5} {shape}: {row['us']:8.1f} us, {row['gbps']:6.0f} GB/s, "
                  f"{row['x_of_flashinfer_bf16']:.2f} x FlashInfer bf16")  # fmt: skip
            if arguments.json:
                write_rows(arguments.json, rows)
    print(f"{facts['machine']}, commit {facts['commit']}; an {GPUS['sm_90'].name} reads the first shape's bf16 in "
          f"{memory_us(GPUS['sm_90'], 512):.0f} us at best")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
