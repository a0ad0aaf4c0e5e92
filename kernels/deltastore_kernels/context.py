"""What attention reads for each request of a batch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .layout import PageLayout


@dataclass(frozen=True)
class Sinks:
    """Raw copies of sequences' first S tokens, which nearly every query attends to.

    key_rot, value_rot [slots, H, S, D] float16
    ids [B] int64: the slot of a request's sequence; -1: it has none, and its pages are read from position 0 on.
        Without a packed tile the first tokens are in the frame, and the slot is not read.
    """

    key_rot: torch.Tensor
    value_rot: torch.Tensor
    ids: torch.Tensor


@dataclass(frozen=True)
class SharedPrefix:
    """Which requests of a batch begin with the same pages, so that a kernel may read those once for all of them.
    A hint: it never changes a result.

    leader [B] int32: the first request of the batch whose leading pages this one shares; itself if there is none.
    pages  [B] int32: that many leading pages, whole and packed, are the same for all that have this leader; 0 where
        a request is alone.
    """

    leader: torch.Tensor
    pages: torch.Tensor


@dataclass(frozen=True)
class PagedContext:
    """The stored context of B requests in one layer: packed whole tiles, then the frame's tokens.

        position   0 ............... packed_tokens | ..... packed_tokens + frame_tokens
        stored in  pages (through page_table)      | frame frame_ids[b]

    pages         [pages, page_bytes] uint8
    page_table    [B, >= pages of the longest request] int: the page that holds positions i*P ..
    packed_tokens [B] int, multiples of 16
    frame_key_rot, frame_value_rot [frames, H, 16, D] float16
    frame_ids     [B] int
    frame_tokens  [B] int, 0 .. 15
    sinks         read instead of positions 0 .. S - 1 of the pages; None: there are none
    shared        None: nobody looked
    checked       `ops.check_context` found this context, or another layer's of the same step with as many pages, frames
                  and sinks, to be sound: kernels do not look at its indices again
    stored_tokens  packed_tokens + frame_tokens on the host [B]; None: not known there
    kept          one dictionary for all layers of one step, in which backends keep what depends on the step alone
                  (ops/_step.py): its lengths, its new tokens. None: they find it out in each call
    """

    layout: PageLayout
    pages: torch.Tensor
    page_table: torch.Tensor
    packed_tokens: torch.Tensor
    frame_key_rot: torch.Tensor
    frame_value_rot: torch.Tensor
    frame_ids: torch.Tensor
    frame_tokens: torch.Tensor
    sinks: Sinks | None = None
    shared: SharedPrefix | None = None
    checked: bool = False
    stored_tokens: Sequence[int] | None = None
    kept: dict[Hashable, Any] | None = None


@dataclass(frozen=True)
class LayerStore:
    """One layer's stored tokens.

    pages                           [pages, page_bytes] uint8
    frame_key_rot, frame_value_rot  [frames, H, 16, D] float16
    sink_key_rot, sink_value_rot    [sinks, H, S, D] float16: sequences' first S tokens, raw, which nearly every query
                                    attends to; no sinks where pages are raw
    key_shaping                     [H, D, D] float32 where keys are calibrated (ops/encode/reference.py: _shaped)
    """

    layout: PageLayout
    pages: torch.Tensor
    frame_key_rot: torch.Tensor
    frame_value_rot: torch.Tensor
    sink_key_rot: torch.Tensor
    sink_value_rot: torch.Tensor
    key_shaping: torch.Tensor | None = None


@dataclass(frozen=True)
class Scoring:
    """How a layer turns dot products into weights.

    scale       multiplies the dot product
    soft_cap    0: none; else scores become soft_cap * tanh(score / soft_cap) (Gemma 2)
    window_left a query sees itself and this many tokens before it; None: all
    """

    scale: float
    soft_cap: float = 0.0
    window_left: int | None = None
