"""FlashInfer's ragged prefill, planned once a step: which parts there are, and a planned wrapper for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch

from .. import cuda_build
from ..transfer import pinned, to_device

FLOAT_WORKSPACE_BYTES = 128 << 20
"""What FlashInfer's documentation recommends for its own intermediate results."""
INT_WORKSPACE_BYTES = 8 << 20
"""What FlashInfer takes for a plan by itself."""
MOST_PLANS = 16
"""Different plans of one step: 128 MiB of the device for INT_WORKSPACE_BYTES of each, and twice that of pinned memory.
Parts of the same shape share a plan, so one long context needs three, however long it is."""


@dataclass(frozen=True)
class Shape:
    """What a layer's kernels depend on. Layers of one shape share the plans of a step."""

    query_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    scale: float
    soft_cap: float


@dataclass(frozen=True)
class Part:
    """Stored tokens that are attended to at once, positions[i] of request requests[i] (int32, on the device), by the
    queries `rows`."""

    rows: slice
    requests: torch.Tensor
    positions: torch.Tensor
    wrapper: object


@dataclass(frozen=True)
class Prefill:
    """A step's attention of one layer shape: the new tokens over each other, then over each part of what is stored."""

    new: object
    parts: list[Part]


def plan_prefill(
    wrappers: Wrappers, shape: Shape, new_tokens: Sequence[int], stored: Sequence[int], room_tokens: int
) -> Prefill | None:
    """None where it takes more than MOST_PLANS."""
    spans_of = list(parts(stored, room_tokens))
    shapes = [
        (tuple(new_tokens[first : first + len(spans)]), tuple(end - begin for begin, end in spans))
        for first, spans in spans_of
    ]
    if len(set(shapes)) + 1 > wrappers.left:
        return None
    planned = {tokens: wrappers.plan(shape, *tokens, causal=False) for tokens in dict.fromkeys(shapes)}
    starts = [0, *accumulate(new_tokens)]
    made = []
    for (first, spans), tokens in zip(spans_of, shapes, strict=True):
        requests = [torch.full((end - begin,), first + i, dtype=torch.int32) for i, (begin, end) in enumerate(spans)]
        positions = [torch.arange(begin, end, dtype=torch.int32) for begin, end in spans]
        indices = (to_device(torch.cat(side), wrappers.device) for side in (requests, positions))
        made.append(Part(slice(starts[first], starts[first + len(spans)]), *indices, planned[tokens]))
    return Prefill(wrappers.plan(shape, new_tokens, new_tokens, causal=True), made)


def parts(stored_tokens: Sequence[int], room_tokens: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Cuts all requests' stored tokens into parts of at most `room_tokens`: the first request of a part, and for it and
    those after it the span of tokens. Every request of a part has tokens in it."""
    request, begin = 0, 0
    while request < len(stored_tokens):
        first, left, spans = request, room_tokens, []
        while request < len(stored_tokens) and left and stored_tokens[request]:
            end = min(stored_tokens[request], begin + left)
            spans.append((begin, end))
            left -= end - begin
            if end < stored_tokens[request]:
                begin = end
                break
            request, begin = request + 1, 0
        if spans:
            yield first, spans
        else:
            request += 1  # nothing is stored of this one


class Wrappers:
    """One of a device's two sets of FlashInfer wrappers, which steps use in turn.

    A wrapper's `plan` fills its pinned buffer on the host and queues a copy of it to its workspace on the device. The
    copy may wait there behind a whole step's kernels, and must not find another plan's numbers: so each plan of a step
    has a wrapper of its own, the next step takes the other set, and a set is taken again after its last step's copies
    are done. That was two steps ago, and the host is hardly ever so far ahead of the device that it has to wait then.
    On the device all is in the stream's order, so both sets share the workspaces.
    """

    def __init__(self, device: torch.device, workspaces: Workspaces) -> None:
        self.device = device
        self.made: list[object] = []
        self._workspaces = workspaces
        self._used = 0
        self._copies = Copies(device)

    def begin_step(self) -> Wrappers:
        self._copies.wait()
        self._used = 0
        return self

    @property
    def left(self) -> int:
        """How many more plans this step may have."""
        return MOST_PLANS - self._used

    def plan(self, shape: Shape, query_tokens: Sequence[int], key_tokens: Sequence[int], causal: bool) -> object:
        """A wrapper, planned for queries and keys of some requests, one after the other."""
        if self._used == len(self.made):
            self.made.append(self._workspaces.wrapper(self._used))
        wrapper = self.made[self._used]
        self._used += 1
        wrapper.plan(
            self._ends(query_tokens),
            self._ends(key_tokens),
            shape.query_heads,
            shape.kv_heads,
            shape.head_dim,
            causal=causal,
            sm_scale=shape.scale,
            logits_soft_cap=shape.soft_cap,
            q_data_type=shape.dtype,
            kv_data_type=shape.dtype,
            non_blocking=True,
        )
        self._copies.queued()
        return wrapper

    def _ends(self, tokens: Sequence[int]) -> torch.Tensor:
        """On the host, where `plan` reads them, and pinned, so that its copies of them do not wait."""
        ends = torch.tensor([0, *accumulate(tokens)], dtype=torch.int32)
        return ends if self.device.type == "cpu" else pinned(ends)


class Workspaces:
    """A device's memory for FlashInfer, and the two sets that share it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._float = torch.empty(FLOAT_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._int: list[torch.Tensor] = []
        self.sets = [Wrappers(device, self) for _ in range(2)]

    def begin_step(self) -> Wrappers:
        """The set for a new step."""
        self.sets.reverse()
        return self.sets[0].begin_step()

    def wrapper(self, number: int) -> object:
        """A new wrapper for plan `number` of a step."""
        if number == len(self._int):
            self._int.append(torch.empty(INT_WORKSPACE_BYTES, dtype=torch.uint8, device=self._device))
        wrapper = flashinfer().BatchPrefillWithRaggedKVCacheWrapper(self._float, kv_layout="NHD")
        wrapper.reset_workspace_buffer(self._float, self._int[number])  # which gives it a pinned buffer of its own
        return wrapper


class Copies:
    """Knows when the copies that were queued so far are done."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def queued(self) -> None:
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()


@cache
def workspaces(device: torch.device) -> Workspaces:
    return Workspaces(device)


def flashinfer() -> object:
    try:
        import flashinfer as package
    except ImportError as error:
        raise cuda_build.CudaUnavailable(
            "extend over pages needs FlashInfer: pip install flashinfer-python; or use the Triton kernels"
        ) from error
    return package
