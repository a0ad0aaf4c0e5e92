"""Contexts to attend over, with everything that must not be read poisoned, and a naive oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from deltastore_kernels import ops
from deltastore_kernels.basis import KeyBasis, fit_key_basis
from deltastore_kernels.context import CoarsePages, Scoring
from deltastore_kernels.layout import NO_PAGE as NOBODYS_PAGE
from deltastore_kernels.layout import Format, PageLayout
from tests.kernels.paged_context import PagedContext, Sinks

OPS = ops.load("reference")
NO_PAGE = 2**31 - 1  # reading it raises


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    """One batch: `lengths` stored tokens of each request; attention of Hq = heads * group queries."""

    fmt: Format
    lengths: tuple[int, ...]
    head_dim: int = 64
    heads: int = 2
    group: int = 3
    page_tokens: int = 64
    window_left: int | None = None
    soft_cap: float = 0.0
    dtype: torch.dtype = torch.float32
    sink_tokens: int = 0  # of every second request, and unlike what its pages hold
    coarse: Format | None = None  # of some of its pages

    def __str__(self) -> str:
        options = (f"w{self.window_left}", f"cap{self.soft_cap:g}", str(self.dtype).removeprefix("torch."))
        options = (*options, *([f"sinks{self.sink_tokens}"] if self.sink_tokens else []))
        shape = f"{self.heads}x{self.group}x{self.head_dim}-page{self.page_tokens}"
        formats = str(self.fmt) if self.coarse is None else f"{self.fmt}and{self.coarse}"
        return "-".join((formats, shape, *options, f"{len(self.lengths)}x{max(self.lengths)}"))

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.head_dim**-0.5, self.soft_cap, self.window_left)

    def kv(self, seed: int) -> list[torch.Tensor]:
        """Each request's tokens [H, length, D] float16, of sizes that differ from token to token."""
        return [
            (
                gaussian(self.heads, length, self.head_dim, seed=seed + i)
                * gaussian(self.heads, length, 1, seed=seed - i).mul(0.5).exp()
            ).half()
            for i, length in enumerate(self.lengths)
        ]


def store(case: Case, keys: list[torch.Tensor], values: list[torch.Tensor]) -> PagedContext:
    """The requests' tokens in scattered pages and frames. All else is 0xFF bytes or NaN, and every
    page that a request does not own is out of range in its row of the page table."""
    layout = PageLayout(case.fmt, case.heads, case.head_dim, case.page_tokens)
    packed = [key.shape[1] // 16 * 16 for key in keys]
    page_counts = [-(-tokens // case.page_tokens) for tokens in packed]
    scattered = torch.randperm(2 * sum(page_counts) + 3, generator=torch.Generator().manual_seed(5))
    pages = torch.full((len(scattered), layout.page_bytes), 255, dtype=torch.uint8)
    coarse = None
    if case.coarse:
        coarse_layout = replace(layout, format=case.coarse)
        coarse = CoarsePages(
            coarse_layout, torch.full((len(scattered) + 1, coarse_layout.page_bytes), 255, dtype=torch.uint8)
        )
        # Of three pages one or two, and the first of some requests.
        scattered = torch.where(scattered % 7 < 4, NOBODYS_PAGE - 1 - scattered, scattered)
    table = torch.full((len(keys), max(page_counts) + 2), NO_PAGE, dtype=torch.int64)
    frame_shape = (len(keys) + 3, case.heads, 16, case.head_dim)
    frames = [torch.full(frame_shape, float("nan"), dtype=torch.float16) for _ in range(2)]
    frame_ids = torch.randperm(frame_shape[0], generator=torch.Generator().manual_seed(6))[: len(keys)]
    for i, sides in enumerate(zip(keys, values, strict=True)):
        own = scattered[sum(page_counts[:i]) : sum(page_counts[: i + 1])]
        table[i, : len(own)] = own
        tile = torch.arange(packed[i] // 16)
        tiles = [side[:, : packed[i]].unflatten(1, (len(tile), 16)).transpose(0, 1) for side in sides]
        pages_of_tiles = own[tile // layout.tiles]
        for is_coarse, kind in ((False, (pages, layout)), (True, coarse and (coarse.pages, coarse.layout))):
            chosen = (pages_of_tiles < 0) == is_coarse
            if chosen.any():
                ids = pages_of_tiles[chosen] % len(kind[0])  # below 0: from the end
                OPS.encode(*(side[chosen] for side in tiles), ids, tile[chosen] % layout.tiles, *kind)
        for frame, side in zip(frames, sides, strict=True):
            frame[frame_ids[i], :, : side.shape[1] - packed[i]] = side[:, packed[i] :]
    return PagedContext(
        layout=layout,
        pages=pages,
        page_table=table,
        packed_tokens=torch.tensor(packed),
        frame_key_rot=frames[0],
        frame_value_rot=frames[1],
        frame_ids=frame_ids,
        frame_tokens=torch.tensor([key.shape[1] for key in keys]) - torch.tensor(packed),
        sinks=sinks_of(case) if case.sink_tokens else None,
        coarse=coarse,
    )


def sinks_of(case: Case) -> Sinks:
    """A slot for every second request, in another order, and one more of NaN."""
    ids = torch.full((len(case.lengths),), -1)
    ids[::2] = torch.arange(len(ids[::2])).flip(0)
    shape = (len(ids[::2]) + 1, case.heads, case.sink_tokens, case.head_dim)
    sides = [gaussian(*shape, seed=seed).half() for seed in (7, 8)]
    for side in sides:
        side[-1] = float("nan")
    return Sinks(*sides, ids)


def sunk_tokens(context: PagedContext, request: int) -> int:
    """How many of a request's first tokens are read from a sink."""
    if context.sinks is None or context.packed_tokens[request] == 0 or context.sinks.ids[request] < 0:
        return 0
    return context.sinks.key_rot.shape[2]


def stored(context: PagedContext, request: int) -> tuple[np.ndarray, np.ndarray]:
    """What a request's context holds, [H, tokens, D] float64: sinks, decoded page by page, then the frame."""
    packed, in_frame = int(context.packed_tokens[request]), int(context.frame_tokens[request])
    sides = []
    for side, frames in enumerate((context.frame_key_rot, context.frame_value_rot)):
        parts = [frames[context.frame_ids[request], :, :in_frame].float()]
        for page in reversed(range(-(-packed // context.layout.page_tokens))):
            tokens = min(context.layout.page_tokens, packed - page * context.layout.page_tokens)
            number = int(context.page_table[request, page])
            kind = context if number >= 0 else context.coarse
            decoded = OPS.decode(kind.pages, torch.tensor([number % len(kind.pages)]), kind.layout)
            parts.insert(0, decoded[side][0, :, :tokens])
        whole = torch.cat(parts, dim=1).double()
        if sunk := sunk_tokens(context, request):
            sinks = (context.sinks.key_rot, context.sinks.value_rot)[side]
            whole[:, :sunk] = sinks[context.sinks.ids[request]].double()
        sides.append(whole.numpy())
    return sides[0], sides[1]


def attend_one(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, position: int, scoring: Scoring
) -> tuple[np.ndarray, float]:
    """One query head [D] at `position` over one KV head [N, D], by the definition."""
    scores, seen = [], []
    for i in range(len(keys)):
        if i > position or (scoring.window_left is not None and position - i > scoring.window_left):
            continue
        score = scoring.scale * float(np.dot(query, keys[i]))
        if scoring.soft_cap:
            score = scoring.soft_cap * math.tanh(score / scoring.soft_cap)
        scores.append(score)
        seen.append(i)
    largest = max(scores)
    weights = [math.exp(score - largest) for score in scores]
    total = sum(weights)
    out = sum(weight / total * values[i] for weight, i in zip(weights, seen, strict=True))
    return out, largest + math.log(total)


def attend_naive(
    query: torch.Tensor, keys: np.ndarray, values: np.ndarray, first_position: int, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [R, Hq, D] at first_position .. over keys, values [H, N, D] -> out [R, Hq, D], lse [R, Hq]."""
    group = query.shape[1] // len(keys)
    rows = [
        [
            attend_one(head, keys[i // group], values[i // group], first_position + row, scoring)
            for i, head in enumerate(heads)
        ]
        for row, heads in enumerate(query.double().numpy())
    ]
    return (
        torch.tensor(np.array([[out for out, _ in row] for row in rows])),
        torch.tensor([[lse for _, lse in row] for row in rows], dtype=torch.float64),
    )


def key_basis(heads: int, head_dim: int, seed: int) -> KeyBasis:
    """A calibration as real heads give them: keys with a mean and a lopsided covariance, queries near a line."""
    lopsided = torch.logspace(0, -1.5, head_dim)
    keys = gaussian(heads, 4 * head_dim, head_dim, seed=seed) * lopsided + gaussian(heads, 1, head_dim, seed=seed + 1)
    queries = gaussian(heads, 4 * head_dim, head_dim, seed=seed + 2) * lopsided.flip(0)
    queries = queries + 2 * gaussian(heads, 1, head_dim, seed=seed + 3)
    mean = keys.mean(1)
    centered = keys - mean[:, None]
    count = keys.shape[1]
    return fit_key_basis(mean, centered.mT @ centered / count, queries.mT @ queries / count)
