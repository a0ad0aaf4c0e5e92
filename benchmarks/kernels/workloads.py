"""What is timed: a shape, our kernel on it, what it is compared with, and the check of its answer.

Baselines read the same tokens as contiguous floats, the best case for them. For decode the query heads
of a group are the rows of one matrix, so torch never repeats a KV head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle

import torch
from torch.nn.functional import scaled_dot_product_attention

from deltastore_kernels import ops
from deltastore_kernels.context import CoarsePages, Scoring
from deltastore_kernels.layout import NO_PAGE, RAW, TILE_TOKENS, Format, PageLayout
from tests import budgets
from tests.kernels.paged_context import PagedContext, run_decode, run_extend

COLD_BYTES = 400 << 20
"""Packed bytes that a cold workload goes through before it sees the same again: more than caches hold."""
CHECKED_TOKENS = 4096
"""Tokens of a request that the twin is asked about; it needs 40 times the time."""
CPU, REFERENCE = ops.load("cpu"), ops.load("reference")


@dataclass(frozen=True)
class Shape:
    fmt: Format
    head_dim: int
    kv_heads: int
    gqa: int
    batch: int
    context: int
    page_tokens: int = 64

    @property
    def layout(self) -> PageLayout:
        return PageLayout(self.fmt, self.kv_heads, self.head_dim, self.page_tokens)

    @property
    def packed_bytes(self) -> int:
        return self.batch * self.context // self.page_tokens * self.layout.page_bytes

    @property
    def fp16_bytes(self) -> int:
        return self.batch * self.context * self.kv_heads * self.head_dim * 2 * 2


def random_context(shape: Shape, seed: int) -> PagedContext:
    """Pages of random codes in random order, scales of ordinary size; empty frames."""
    generator = torch.Generator().manual_seed(seed)
    layout, count = shape.layout, shape.batch * shape.context // shape.page_tokens
    frames = torch.zeros(shape.batch, shape.kv_heads, TILE_TOKENS, shape.head_dim, dtype=torch.float16)
    return PagedContext(
        layout=layout,
        pages=_random_pages(layout, count, generator),
        page_table=torch.randperm(count, generator=generator).view(shape.batch, -1),
        packed_tokens=torch.full((shape.batch,), shape.context),
        frame_key_rot=frames,
        frame_value_rot=frames,
        frame_ids=torch.arange(shape.batch),
        frame_tokens=torch.zeros(shape.batch, dtype=torch.int64),
    )


def _random_pages(layout: PageLayout, count: int, generator: torch.Generator) -> torch.Tensor:
    if layout.format.is_raw:
        return torch.randn(count, layout.page_bytes // 2, generator=generator).half().view(torch.uint8)
    pages = torch.randint(0, 256, (count, layout.page_bytes), dtype=torch.uint8, generator=generator)
    offset, _ = layout.field_offsets_bytes["anchors"]
    pages[:, offset:] = 160  # largest scale 1
    return pages


def check(got: torch.Tensor, want: torch.Tensor) -> None:
    """Raise unless our answer is the twin's, within the budget that the tests hold it to."""
    rms = float(((got - want).square().sum() / want.square().sum()).sqrt())
    if not rms <= budgets.BACKEND_ATTEND_INT8:
        raise SystemExit(f"the kernel's answer is {rms:.3g} from the twin's; not timed")


Contestants = dict[str, Callable[[], object]]


def decode_contestants(shape: Shape, cold: bool, baselines: bool) -> Contestants:
    """One decode step. Cold: every call reads another copy of the context than the one before."""
    contestants: Contestants = {"us": _decode_call(shape, cold)}
    if not baselines:
        return contestants
    if not shape.fmt.is_raw:
        contestants["raw_pages_us"] = _decode_call(replace(shape, fmt=RAW), cold)
    query = torch.randn(shape.batch, shape.kv_heads, shape.gqa, shape.head_dim)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        key, value = (torch.randn(shape.batch, shape.kv_heads, shape.context, shape.head_dim).to(dtype) for _ in "kv")
        contestants[f"torch_sdpa_{name}_us"] = _sdpa(query.to(dtype), key, value)
        if dtype == torch.float32:
            contestants["torch_matmul_fp32_us"] = _matmul(query, key, value)
            contestants["sglang_torch_native_fp32_us"] = _torch_native(query, key, value)
    return contestants


def _decode_call(shape: Shape, cold: bool) -> Callable[[], object]:
    """Our kernel on pages of the shape's format, its answer checked."""
    return _step(_contexts(shape, cold), shape)


def levels_contestants(shape: Shape, coarse: Format) -> Contestants:
    """One decode step over pages of two formats: the first half of each context coarse, all fine, every second page
    coarse; and over pages of one format in a store that knows no other."""
    contexts, page = _contexts(shape, cold=True), torch.arange(shape.context // shape.page_tokens)
    kinds = {
        "us": page < len(page) // 2,
        "all_fine_us": page < 0,
        "every_second_coarse_us": page % 2 == 0,
        "one_format_us": None,
    }
    found: Contestants = {}
    for turn, (name, is_coarse) in enumerate(kinds.items()):
        # Those of a round read other pages than one another.
        first = len(contexts) * turn // len(kinds)
        own = contexts[first:] + contexts[:first]
        if is_coarse is not None:
            own = [_with_coarse(context, coarse, is_coarse) for context in own]
        found[name] = _step(own, shape)
    return found


def _contexts(shape: Shape, cold: bool) -> list[PagedContext]:
    copies = max(2, -(-COLD_BYTES // shape.packed_bytes)) if cold else 1
    return [random_context(shape, seed) for seed in range(copies)]


def _with_coarse(context: PagedContext, fmt: Format, is_coarse: torch.Tensor) -> PagedContext:
    """The same with pages of another format, as many again, in the places that is_coarse [pages] says of each
    request."""
    layout = replace(context.layout, format=fmt)
    pages = _random_pages(layout, len(context.pages) + 1, torch.Generator().manual_seed(1))
    table = torch.where(is_coarse, NO_PAGE - 1 - context.page_table, context.page_table)
    return replace(context, page_table=table, coarse=CoarsePages(layout, pages))


def _step(contexts: list[PagedContext], shape: Shape) -> Callable[[], object]:
    """A decode step of our kernel over these contexts in turn, its answer checked."""
    query = torch.randn(shape.batch, shape.kv_heads * shape.gqa, shape.head_dim)
    scoring = Scoring(shape.head_dim**-0.5)
    checked = replace(contexts[0], packed_tokens=contexts[0].packed_tokens.clamp_max(CHECKED_TOKENS))
    check(run_decode(CPU, query, checked, scoring)[0], run_decode(REFERENCE, query, checked, scoring)[0])
    # Planned once, as a server plans a step once for all its layers.
    turn = cycle([(CPU.plan_decode(context.step, context.layer), context.layer) for context in contexts])

    def call() -> object:
        plan, layer = next(turn)
        return plan.run(query, layer, scoring)

    return call


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: object) -> Callable[[], object]:
    return lambda: scaled_dot_product_attention(query, key, value, **options)


def _matmul(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Callable[[], object]:
    scale = query.shape[-1] ** -0.5
    return lambda: (query @ key.transpose(-1, -2)).mul_(scale).softmax(-1) @ value


def _torch_native(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Callable[[], object]:
    """What SGLang's torch_native_backend.py does for a decode step: gather each request's tokens from a
    token-major cache, then SDPA with grouped heads. The same numbers, one token after the other."""
    batch, kv_heads, context, head_dim = key.shape
    caches = [x.transpose(1, 2).reshape(batch * context, kv_heads, head_dim) for x in (key, value)]
    tokens = torch.arange(batch * context).view(batch, context)
    rows = query.view(batch, -1, 1, head_dim)

    def step() -> None:
        for row, own in zip(rows, tokens, strict=True):
            sides = (cache[own].movedim(0, 1)[None] for cache in caches)
            scaled_dot_product_attention(row[None], *sides, enable_gqa=True)

    return step


def extend_contestants(shape: Shape, new_tokens: int) -> Contestants:
    """`new_tokens` of one request behind shape.context packed ones."""
    context, scoring = random_context(shape, seed=0), Scoring(shape.head_dim**-0.5)
    query = torch.randn(new_tokens, shape.kv_heads * shape.gqa, shape.head_dim)
    key, value = (torch.randn(new_tokens, shape.kv_heads, shape.head_dim) for _ in "kv")
    arguments = (query, key, value, [new_tokens], context, scoring)
    check(run_extend(CPU, *arguments)[0], run_extend(REFERENCE, *arguments)[0])
    plan, layer = CPU.plan_extend(context.step, [new_tokens], context.layer), context.layer
    contestants: Contestants = {"us": lambda: plan.run(query, key, value, layer, scoring)}
    total = shape.context + new_tokens
    seen = {"is_causal": True}
    if shape.context:
        seen = {"attn_mask": torch.ones(new_tokens, total, dtype=torch.bool).tril(shape.context)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        heads = query.transpose(0, 1).contiguous()[None].to(dtype)
        sides = (torch.randn(1, shape.kv_heads * shape.gqa, total, shape.head_dim).to(dtype) for _ in "kv")
        contestants[f"torch_sdpa_{name}_us"] = _sdpa(heads, *sides, **seen)
    return contestants


def encode_contestants(shape: Shape) -> Contestants:
    """shape.context tokens' raw tiles to pages, and a plain copy of the raw tiles."""
    layout, tiles = shape.layout, shape.context // TILE_TOKENS
    sides = [torch.randn(tiles, shape.kv_heads, TILE_TOKENS, shape.head_dim).half() for _ in "kv"]
    tile = torch.arange(tiles)
    pages = torch.zeros(2, tiles // layout.tiles, layout.page_bytes, dtype=torch.uint8)
    for ops_, image in zip((CPU, REFERENCE), pages, strict=True):
        ops_.encode(*sides, tile // layout.tiles, tile % layout.tiles, image, layout)
    differ = float((pages[0] != pages[1]).float().mean())
    # A near tie of a tile's largest scale changes all bytes of that tile.
    if differ > budgets.BACKEND_SCALES_DIFFER + 2 / (tiles * shape.kv_heads):
        raise SystemExit(f"encode: {differ:.2%} of the bytes differ from the twin's; not timed")
    copies = [torch.empty_like(side) for side in sides]
    return {
        "us": lambda: CPU.encode(*sides, tile // layout.tiles, tile % layout.tiles, pages[0], layout),
        "copy_us": lambda: [copy.copy_(side) for copy, side in zip(copies, sides, strict=True)],
    }


def unpack_contestants(shape: Shape) -> Contestants:
    """shape.context tokens' pages to floats, and a plain fill of those floats."""
    context = random_context(shape, seed=0)
    page_ids = context.page_table[0]
    got, want = (backend.decode(context.pages, page_ids, shape.layout) for backend in (CPU, REFERENCE))
    for side in range(2):
        torch.testing.assert_close(got[side], want[side], rtol=budgets.BACKEND_DECODE, atol=0)
    floats = torch.empty(2, shape.context, shape.kv_heads, shape.head_dim)
    return {
        "us": lambda: CPU.decode(context.pages, page_ids, shape.layout),
        "fill_us": lambda: floats.fill_(1.0),
    }


def rotate_contestants(shape: Shape) -> Contestants:
    """The query heads of shape.context tokens, and a plain copy of them."""
    x = torch.randn(shape.context, shape.kv_heads * shape.gqa, shape.head_dim)
    torch.testing.assert_close(CPU.rotate(x), REFERENCE.rotate(x), rtol=0, atol=budgets.BACKEND_ROTATE)
    return {"us": lambda: CPU.rotate(x), "twin_us": lambda: REFERENCE.rotate(x), "copy_us": lambda: x.clone()}
