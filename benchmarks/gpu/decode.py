"""Decode attention: our CUDA and Triton kernels over packed pages, beside torch's SDPA over bf16 in one piece and
FlashInfer over bf16 and fp8 pages. One layer, equal contexts.

Every contestant's answer is checked before it is timed, ours against the definition (ops/attend_decode/reference.py),
the others' against attention over the very numbers they were given; a wrong answer has no figure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.machine import Absent, Machine, relative_error, require
from benchmarks.gpu.pieces import Piece
from benchmarks.gpu.roofline import bytes_per_token
from deltastore_kernels.context import LayerStore, Scoring, StepContext
from deltastore_kernels.layout import RAW, Format, PageLayout
from deltastore_kernels.ops.attend_decode import reference

PAGE_TOKENS = 64
#: relative RMS of all outputs: ours round to 15 bits and bfloat16 outputs (2^-9); FlashInfer's fp8 queries stay bf16
LARGEST_ERROR = 8e-3

Attend = Callable[[], torch.Tensor]
PACKED = (Format(4, 3), Format(4, 2), Format(3, 2))
BACKENDS = {"cuda": "flashinfer", "triton": "triton"}
"""Whose decode it is -> the backend as `ops.load` takes it."""
OURS = {f"{kernel} {fmt}": (backend, fmt) for fmt in (*PACKED, RAW) for kernel, backend in BACKENDS.items()}
FLASHINFER = {"flashinfer bf16": torch.bfloat16, "flashinfer fp8": torch.float8_e4m3fn}
SDPA = "sdpa bf16"
MOST_TOKENS = 4 << 20
"""Of a batch: 17 GB of bfloat16 keys and values."""


@dataclass(frozen=True)
class Shape:
    batch: int
    context_tokens: int
    kv_heads: int = 8
    gqa: int = 4
    head_dim: int = 128

    def __str__(self) -> str:
        heads = f"{self.kv_heads}x{self.gqa}x{self.head_dim}"
        return f"{heads} batch {self.batch} context {self.context_tokens}"

    @property
    def pages(self) -> int:
        return self.batch * self.context_tokens // PAGE_TOKENS

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.head_dim**-0.5)

    def layout(self, fmt: Format) -> PageLayout:
        return PageLayout(fmt, self.kv_heads, self.head_dim, PAGE_TOKENS)


FIRST = [Shape(64, 8192), Shape(1, 32768), Shape(32, 2048), Shape(32, 32768)]
"""What says most, before the grid."""
GRID = [
    Shape(batch, context)
    for context in (1024, 4096, 16384, 65536, 131072)
    for batch in (1, 8, 32, 128)
    if batch * context <= MOST_TOKENS
]
OTHER_HEADS = [Shape(32, 8192, head_dim=64), Shape(32, 8192, gqa=8), Shape(32, 8192, kv_heads=2, gqa=8)]


def pieces(machine: Machine) -> list[Piece]:
    shapes = machine.size([*FIRST, *GRID, *OTHER_HEADS], [Shape(2, 128, 1, 4, 64)])
    few = [SDPA, *FLASHINFER, "cuda K4V2", "triton K4V2", "cuda K4V3"]
    found = []
    for number, shape in enumerate(shapes):
        names = [SDPA, *FLASHINFER, *OURS] if number < machine.size(1, 0) else few
        found += [Piece(f"{name} {shape}", partial(measure, name, shape)) for name in names[: machine.size(99, 5)]]
    return found


def measure(name: str, shape: Shape, machine: Machine) -> dict[str, Any]:
    query_shape = shape.batch, shape.kv_heads * shape.gqa, shape.head_dim
    query = torch.randn(query_shape, device=machine.device, generator=machine.generator(2)).bfloat16()
    bf16_bytes = 4 * shape.head_dim * shape.kv_heads * shape.batch * shape.context_tokens
    machine.need_bytes(1.5 * bf16_bytes, str(shape))
    if name in OURS:
        attend, want, per_token = ours(*OURS[name], shape, query, machine)
    elif name == SDPA:
        attend, want, per_token = sdpa(shape, query, machine)
    else:
        attend, want, per_token = flashinfer(FLASHINFER[name], shape, query, machine)
    error = require(name, relative_error(attend(), want), LARGEST_ERROR)
    moved = per_token * shape.batch * shape.context_tokens * shape.kv_heads
    return {"kernel": name, **asdict(shape), "error": error} | machine.timed(attend, moved)


def random_pages(layout: PageLayout, pages: int, generator: torch.Generator) -> torch.Tensor:
    """Random codes: valid for every format, and no encoding of gigabytes. Scales are near one."""
    shape = pages, layout.page_bytes
    if layout.format.is_raw:
        halves = torch.randn(pages, layout.page_bytes // 2, device=generator.device, generator=generator)
        return halves.half().view(torch.uint8)
    random = torch.randint(0, 256, shape, dtype=torch.uint8, device=generator.device, generator=generator)
    offset, tile_bytes = layout.field_offsets_bytes["anchors"]
    random[:, offset : offset + tile_bytes * layout.num_kv_heads * layout.tiles] = 168  # two, before the nibbles
    return random


def packed_context(shape: Shape, fmt: Format, machine: Machine) -> tuple[StepContext, LayerStore]:
    """Scattered pages, full to the end."""
    layout, generator = shape.layout(fmt), machine.generator(1)
    pages = random_pages(layout, shape.pages, generator)
    table = torch.randperm(shape.pages, device=machine.device, generator=generator).int().view(shape.batch, -1)
    full = torch.full((shape.batch,), shape.context_tokens, dtype=torch.int32, device=machine.device)
    frames = torch.zeros(1, shape.kv_heads, 16, shape.head_dim, dtype=torch.float16, device=machine.device)
    none = torch.zeros_like(full)
    step = StepContext(table, full, frame_ids=none, frame_tokens=none, sink_ids=none - 1)
    return step, LayerStore(layout, pages, frames, frames.clone(), frames[:0], frames[:0])


def ours(
    backend: str, fmt: Format, shape: Shape, query: torch.Tensor, machine: Machine
) -> tuple[Attend, torch.Tensor, float]:
    step, layer = packed_context(shape, fmt, machine)
    want, _ = reference.DecodePlan(step).run(query.float(), layer, shape.scoring)
    plan = machine.operations(backend).plan_decode(step)  # a step plans once for all its layers
    return lambda: plan.run(query, layer, shape.scoring)[0], want, bytes_per_token(layer.layout)


def sdpa(shape: Shape, query: torch.Tensor, machine: Machine) -> tuple[Attend, torch.Tensor, float]:
    """A KV head's query heads as rows, so that its keys are read once."""
    size = shape.batch, shape.kv_heads, shape.context_tokens, shape.head_dim
    generator = machine.generator(1)
    key, value = (torch.randn(size, device=machine.device, generator=generator, dtype=torch.bfloat16) for _ in "kv")
    want = torch.stack([attend_float32(*each, shape) for each in zip(query, key, value, strict=True)])
    grouped = query.unflatten(1, (shape.kv_heads, shape.gqa))

    def attend() -> torch.Tensor:
        return scaled_dot_product_attention(grouped, key, value, scale=shape.scoring.scale).flatten(1, 2)

    return attend, want, 4 * shape.head_dim


def attend_float32(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shape: Shape) -> torch.Tensor:
    """One request: query [Hq, D] over key, value [H, N, D] -> out [Hq, D]."""
    scores = query.float().view(shape.kv_heads, shape.gqa, -1) @ key.float().mT * shape.scoring.scale
    return (scores.softmax(-1) @ value.float()).flatten(0, 1)


def flashinfer(
    dtype: torch.dtype, shape: Shape, query: torch.Tensor, machine: Machine
) -> tuple[Attend, torch.Tensor, float]:
    try:
        import flashinfer as package
    except ImportError as error:
        raise Absent(f"FlashInfer is not installed ({error})") from error
    generator = machine.generator(1)
    size = shape.pages, 2, PAGE_TOKENS, shape.kv_heads, shape.head_dim
    pages = torch.randn(size, device=machine.device, generator=generator, dtype=torch.bfloat16).to(dtype)
    table = torch.randperm(shape.pages, device=machine.device, generator=generator).int().view(shape.batch, -1)
    want = torch.stack(
        [
            attend_float32(one, *(side.flatten(0, 1).transpose(0, 1) for side in pages[own.long()].unbind(1)), shape)
            for one, own in zip(query, table, strict=True)
        ]
    )
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=machine.device)
    wrapper = package.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=shape.gqa > 1)
    indptr = torch.arange(0, shape.pages + 1, shape.context_tokens // PAGE_TOKENS, dtype=torch.int32)
    last = torch.full((shape.batch,), PAGE_TOKENS, dtype=torch.int32)
    heads = shape.kv_heads * shape.gqa, shape.kv_heads, shape.head_dim, PAGE_TOKENS
    wrapper.plan(indptr, table.flatten(), last, *heads, q_data_type=query.dtype, kv_data_type=dtype)
    return lambda: wrapper.run(query, pages), want, 2 * shape.head_dim * dtype.itemsize
