"""attend_decode in Triton: split over the context, merged as the result leaves; what requests share is read once.

A program attends one KV head's group of query heads over its part of a request's tiles. Parts are as many as page
table and batch size allow, whatever the lengths are: nothing depends on values on the device, so a CUDA graph can hold
it. Part 0 also reads sinks and frame.

With `StepContext.shared`, programs of a second kind take the leading pages of a leader for the queries of all its
members at once, and a member's own parts begin behind them.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton

from ...context import LayerStore, Scoring, StepContext
from .._triton import PageConstants, generation, use_asm
from .._triton_decode import attend_own, attend_shared
from .._triton_leave import leave

if TYPE_CHECKING:
    from ...basis import Basis

BLOCK_TILES = 4
"""Tiles of one step: 64 tokens."""
PROGRAMS_PER_MULTIPROCESSOR = 12
"""One-warp programs that fit, by their registers; more parts than fill the device would only have to be merged."""
MAX_PARTS = 64


class DecodePlan:
    """See the twin. What launches need beside tensors follows from shapes, and layers of one shape share it; no index
    is looked at."""

    def __init__(self, step: StepContext, bounds: LayerStore | None = None) -> None:
        self._step = step
        self._launches: dict[Hashable, _Launches] = {}

    def run(
        self,
        query_rot: torch.Tensor,
        layer: LayerStore,
        scoring: Scoring,
        basis: Basis | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See the twin. Queries and weights are rounded to 15 bits each, of their largest in a row and block."""
        batch, query_heads, head_dim = query_rot.shape
        query, step, shared = query_rot.contiguous(), self._step, self._step.shared
        launches = self._launches_of(query, layer, scoring)
        partial_out = query.new_empty((batch, query_heads, launches.all_parts, head_dim), dtype=torch.float32)
        partial_log2 = query.new_empty((batch, query_heads, launches.all_parts), dtype=torch.float32)
        stored = (
            query,
            partial_out,
            partial_log2,
            layer.pages,
            step.page_table,
            step.page_table.stride(0),
            step.packed_tokens,
            step.frame_tokens,
            step.sink_ids,
            step.packed_tokens if shared is None else shared.leader,
            step.packed_tokens if shared is None else shared.pages,
            scoring.scale,
        )
        frames = (layer.frame_key_rot, layer.frame_value_rot)
        sinks = (layer.sink_key_rot, layer.sink_value_rot) if layer.sink_tokens else frames
        if batch:
            attend_own[launches.own_grid](*stored, *frames, step.frame_ids, *sinks, **launches.own)
            if shared is not None:
                attend_shared[launches.shared_grid](*stored, batch, **launches.shared)
        return leave(partial_out, partial_log2, query, scoring, basis, sink_logits)

    def _launches_of(self, query: torch.Tensor, layer: LayerStore, scoring: Scoring) -> _Launches:
        shape = (query.shape, query.device, layer.layout, layer.sink_tokens, scoring.soft_cap, scoring.window_left)
        if shape not in self._launches:
            self._launches[shape] = _launches(query, layer, scoring, self._step)
        return self._launches[shape]


@dataclass(frozen=True)
class _Launches:
    """Grids of the kernels, and what they are launched with beside tensors. `all_parts`: of each request's context,
    its own and those that others share."""

    all_parts: int
    own_grid: tuple[int, ...]
    own: dict[str, Any]
    shared_grid: tuple[int, ...]
    shared: dict[str, Any]


def _launches(query: torch.Tensor, layer: LayerStore, scoring: Scoring, step: StepContext) -> _Launches:
    layout = layer.layout
    batch, query_heads, head_dim = query.shape
    heads, group = layout.num_kv_heads, query_heads // layout.num_kv_heads
    device = generation(query.device)
    launch, launch_shared = own_launch(group, head_dim, device), shared_launch(group, head_dim, device)
    chunks = triton.cdiv(batch, launch_shared["ROWS"] // group)
    parts = _parts(step, layer, batch, scoring.window_left)
    shared_parts = 0 if step.shared is None else _parts(step, layer, chunks * launch_shared["num_warps"], None)
    all_parts = parts + shared_parts
    constants = {
        "PAGE": PageConstants.of(layout),
        "GROUP": group,
        "SINKS": layer.sink_tokens,
        "SOFT_CAP": scoring.soft_cap,
        "WINDOW_LEFT": -1 if scoring.window_left is None else scoring.window_left,
        "ALL_PARTS": all_parts,
        "USE_ASM": use_asm(query),
    }
    sink_rows = max(16, triton.next_power_of_2(layer.sink_tokens))
    return _Launches(
        all_parts,
        own_grid=(batch * heads, parts),
        own={**constants, "HAS_SHARED": step.shared is not None, "SINK_ROWS": sink_rows, "PARTS": parts, **launch},
        shared_grid=(batch * heads, chunks, shared_parts),
        shared={
            **constants, "BATCH": triton.next_power_of_2(batch), "FIRST_PART": parts, "PARTS": shared_parts,
            **launch_shared,
        },
    )  # fmt: skip


def own_launch(group: int, head_dim: int, device: int) -> dict[str, int]:
    """Rows and launch options of `attend_own` for a `generation` of device.

    One warp for the 16 rows of a matrix unit: no barrier, and no other warp unpacks the same. Wider heads take more, so
    that nothing spills.
    """
    rows = max(8, triton.next_power_of_2(group))
    warps = rows // 8 * {256: 2, 512: 8}.get(head_dim, 1)
    launch = {"ROWS": rows, "TILES": block_tiles(head_dim), "num_warps": warps, "num_stages": 2}
    # Left alone, ptxas takes 168 registers there and spills; 10 warps of 200 fit a multiprocessor as well.
    return launch | ({"maxnreg": 200} if device == 10 and head_dim == 128 else {})


def shared_launch(group: int, head_dim: int, device: int) -> dict[str, int]:
    """As `own_launch`, of `attend_shared`: 32 rows are one of Hopper's matrix instructions, upper and lower halves
    together. Elsewhere 16, because Triton 3.8 fails to compile 32 for Blackwell's ("Illegal shared layout"), and for
    heads of 512, which spill."""
    rows = max(32 if device == 9 and head_dim < 512 else 16, triton.next_power_of_2(group))
    warps = rows // 8 * {256: 2, 512: 4}.get(head_dim, 1)
    return {"ROWS": rows, "TILES": block_tiles(head_dim), "num_warps": warps, "num_stages": 2}


def block_tiles(head_dim: int) -> int:
    """Tiles of one step: fewer of the widest heads, for which shared memory would not do."""
    return BLOCK_TILES if head_dim < 512 else BLOCK_TILES // 2


def _parts(step: StepContext, layer: LayerStore, warps: int, window_left: int | None) -> int:
    """Parts of each request's context, for so many warps of each KV head and part: from shapes alone."""
    most_tokens = step.page_table.shape[1] * layer.layout.page_tokens
    if window_left is not None:
        most_tokens = min(most_tokens, window_left + 2 * 16)
    blocks = triton.cdiv(most_tokens, BLOCK_TILES * 16)
    programs = _multiprocessors(layer.pages.device) * PROGRAMS_PER_MULTIPROCESSOR
    wanted = triton.cdiv(programs, max(1, warps) * layer.layout.num_kv_heads)
    return max(1, min(wanted, blocks, MAX_PARTS))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
