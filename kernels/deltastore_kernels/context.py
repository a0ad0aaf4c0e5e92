"""What is stored: a step's requests, the same for all layers, and one layer's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .layout import PageLayout


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
class StepContext:
    """What the B requests of a step have stored, and where; the same for all layers. Packed whole tiles, then the
    frame's tokens:

        position   0 ............... packed_tokens | ..... packed_tokens + frame_tokens
        stored in  pages (through page_table)      | frame frame_ids[b]

    page_table    [B, >= pages of the longest request] int: the page that holds positions i*P ..; see CoarsePages
    packed_tokens [B] int, multiples of 16
    frame_ids     [B] int
    frame_tokens  [B] int, 0 .. 15
    sink_ids      [B] int: the sink of a request's sequence, read instead of its pages' first positions; -1: it has
                  none. Without a packed tile the first tokens are in the frame, and the sink is not read. Layers
                  without sinks ignore it
    shared        None: nobody looked
    stored_tokens [B] packed_tokens + frame_tokens, on the host; None: not known there
    """

    page_table: torch.Tensor
    packed_tokens: torch.Tensor
    frame_ids: torch.Tensor
    frame_tokens: torch.Tensor
    sink_ids: torch.Tensor
    shared: SharedPrefix | None = None
    stored_tokens: Sequence[int] | None = None


@dataclass(frozen=True)
class CoarsePages:
    """Pages of fewer bits: layout, and pages [coarse pages, page_bytes] uint8. Steps name them by numbers below 0, from
    the end, as Python does. The last one, which would be NO_PAGE, is nobody's."""

    layout: PageLayout
    pages: torch.Tensor


@dataclass(frozen=True)
class LayerStore:
    """One layer's stored tokens.

    pages                           [pages, page_bytes] uint8
    coarse                          None: all pages are alike
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
    coarse: CoarsePages | None = None

    @property
    def sink_tokens(self) -> int:
        """Tokens of a sink; 0: this layer has no sinks."""
        return self.sink_key_rot.shape[2] if len(self.sink_key_rot) else 0


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
