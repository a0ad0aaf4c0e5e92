"""attend_extend on fake CUDA tensors: what it asks of the device, what it copies, what it plans, layer by layer.

Kernels and FlashInfer are stubs here; test_cuda_ops.py and triton_attend.py have the numbers.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import ClassVar

import flashinfer
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from deltastore_kernels import cuda_build, transfer
from deltastore_kernels.context import Scoring
from deltastore_kernels.layout import Format, PageLayout
from deltastore_kernels.ops import _flashinfer as plans
from deltastore_kernels.ops.attend_extend import cuda, triton
from tests.kernels.paged_context import PagedContext, Sinks

LAYERS, HEADS, GROUP, HEAD_DIM = 3, 2, 4, 64
SCORING = Scoring(0.125)


@dataclass
class Traffic(TorchDispatchMode):
    """Copies between host and device, by what they cost the host."""

    waits: list[str] = field(default_factory=list)
    queued: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        source, target = (args[1], args[0]) if "copy_" in str(function) else (next(iter(args), None), out)
        if isinstance(source, torch.Tensor) and isinstance(target, torch.Tensor) and source.device != target.device:
            if getattr(source, "is_pinned_here", False) and (kwargs or {}).get("non_blocking"):
                self.queued += 1
            else:
                self.waits.append(f"{function}: {source.device} to {target.device}")
        return out


class Wrapper:
    """FlashInfer's wrapper without kernels; one for all, so that plans and runs can be counted."""

    made: ClassVar[list[Wrapper]] = []
    real = flashinfer.BatchPrefillWithRaggedKVCacheWrapper

    def __init__(self, workspace: torch.Tensor, **keywords) -> None:
        inspect.signature(self.real.__init__).bind(self, workspace, **keywords)
        self.plans, self.runs = [], 0
        Wrapper.made.append(self)

    def reset_workspace_buffer(self, workspace: torch.Tensor, int_workspace: torch.Tensor) -> None:
        self.int_workspace = int_workspace

    def plan(self, *args, **keywords) -> None:
        bound = inspect.signature(self.real.plan).bind(self, *args, **keywords).arguments
        for name in ("qo_indptr", "kv_indptr"):
            assert bound[name].device.type == "cpu"  # where the real one reads it
            bound[name].to("cuda", non_blocking=bound["non_blocking"])  # and copies it
        self.plans.append(bound)

    def run(self, query, key, value, **keywords) -> tuple[torch.Tensor, torch.Tensor]:
        assert query.device == key.device == value.device
        self.runs += 1
        return torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)


class Kernel:
    """In place of a Triton kernel."""

    def __init__(self) -> None:
        self.blocks: list[torch.Tensor] = []

    def __getitem__(self, grid):
        return lambda blocks, *_arguments, **_constants: self.blocks.append(blocks)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Everything that needs a GPU is a stub."""
    Wrapper.made.clear()
    plans.workspaces.cache_clear()

    def pinned(indices: torch.Tensor) -> torch.Tensor:
        indices.is_pinned_here = True
        return indices

    kernel = Kernel()
    package = SimpleNamespace(
        BatchPrefillWithRaggedKVCacheWrapper=Wrapper, merge_state=lambda out, lse, *_other: (out, lse)
    )
    for module in (cuda, plans):
        monkeypatch.setattr(module, "flashinfer", lambda: package)
    for module in (transfer, plans):
        monkeypatch.setattr(module, "pinned", pinned)
    monkeypatch.setattr(plans, "Copies", lambda device: SimpleNamespace(queued=lambda: None, wait=lambda: None))
    monkeypatch.setattr(cuda_build, "load", lambda kernels: SimpleNamespace(decode_context=lambda *_arguments: None))
    monkeypatch.setattr(triton, "attend_rows", kernel)
    monkeypatch.setattr(triton, "use_asm", lambda tensor: True)
    yield kernel
    plans.workspaces.cache_clear()


@pytest.fixture
def gpu():
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def context_of(stored: tuple[int, ...], known: bool = True) -> PagedContext:
    """A step and a layer on the device."""
    layout, requests = PageLayout(Format(4, 2), HEADS, HEAD_DIM, 16), len(stored)
    with torch.device("cuda"):
        frames = torch.empty(4, HEADS, 16, HEAD_DIM, dtype=torch.float16)
        index = torch.empty(requests, dtype=torch.int32)
        return PagedContext(
            layout=layout,
            pages=torch.empty(8, layout.page_bytes, dtype=torch.uint8),
            page_table=torch.empty(requests, max(stored) // 16 + 1, dtype=torch.int32),
            packed_tokens=index,
            frame_key_rot=frames,
            frame_value_rot=frames,
            frame_ids=index,
            frame_tokens=index,
            sinks=Sinks(frames[:, :, :1].contiguous(), frames[:, :, :1].contiguous(), index),
            stored_tokens=list(stored) if known else None,
        )


def step(
    module, context: PagedContext, new_tokens: list[int], scorings: tuple[Scoring, ...] = (SCORING,) * LAYERS
) -> list[Traffic]:
    """A plan, and a run of each layer; each layer's traffic."""
    traffic = []
    plan, layer = module.ExtendPlan(context.step, new_tokens), context.layer
    for scoring in scorings:
        rows = [
            torch.empty(sum(new_tokens), heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
            for heads in (HEADS * GROUP, HEADS, HEADS)
        ]
        with Traffic() as seen:
            out, _ = plan.run(*rows, layer, scoring)
        assert out.device.type == "cuda"
        traffic.append(seen)
    return traffic


@pytest.mark.parametrize("module", [cuda, triton])
@pytest.mark.parametrize("window_left", [None, 20])
def test_no_layer_waits_and_the_first_alone_copies(module, window_left: int | None, kernel: Kernel, gpu) -> None:
    traffic = step(
        module, context_of((100, 0, 40_000)), [5, 7, 40], (Scoring(0.125, window_left=window_left),) * LAYERS
    )
    assert [seen.waits for seen in traffic] == [[]] * LAYERS
    assert traffic[0].queued > 0
    assert [seen.queued for seen in traffic[1:]] == [0] * (LAYERS - 1)


def test_lengths_that_the_host_does_not_know_are_asked_for(kernel: Kernel, gpu) -> None:
    """So that a wait would show: on fake tensors it raises."""
    with pytest.raises(DataDependentOutputException):
        step(cuda, context_of((100, 20), known=False), [5, 7])


def test_lengths_are_asked_for_once_a_step(kernel: Kernel, gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: asked.append(tensor) or [100, 20])
    step(cuda, context_of((100, 20), known=False), [5, 7])
    assert len(asked) == 1


def test_plans_are_made_once_a_step_and_each_has_its_own_buffer(kernel: Kernel, gpu, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "WORKSPACE_BYTES", 64 * HEADS * HEAD_DIM * 4)  # parts of 64 tokens
    contexts = [(100, 0, 90), (33, 10, 20), (200, 64, 64)]
    for stored in contexts:
        step(cuda, context_of(stored), [5, 7, 40])
    first, second = (one.made for one in plans.workspaces(torch.device("cuda:0")).sets)
    assert not {id(wrapper) for wrapper in first} & {id(wrapper) for wrapper in second}
    # The sets took turns: two steps for one, one for the other; each plan of a step is another wrapper's.
    assert sorted(max(len(wrapper.plans) for wrapper in one) for one in (first, second)) == [1, 2]
    assert all(wrapper.runs >= LAYERS * len(wrapper.plans) for wrapper in Wrapper.made)
    assert all(one.int_workspace is other.int_workspace for one, other in zip(first, second, strict=False))
    assert len({id(wrapper.int_workspace) for wrapper in first}) == len(first)


def test_parts_of_one_shape_share_a_plan(kernel: Kernel, gpu, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "WORKSPACE_BYTES", 64 * HEADS * HEAD_DIM * 4)
    step(cuda, context_of((64 * 100 + 3,)), [5])
    assert len(Wrapper.made) == 3  # a whole part, the last part, the new tokens
    assert max(wrapper.runs for wrapper in Wrapper.made) == 100 * LAYERS


def test_more_plans_than_there_may_be_are_another_kernels(kernel: Kernel, gpu, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "WORKSPACE_BYTES", 64 * HEADS * HEAD_DIM * 4)
    stored = tuple(64 + i for i in range(40))
    traffic = step(cuda, context_of(stored), [1 + i for i in range(40)])
    assert [seen.waits for seen in traffic] == [[]] * LAYERS
    assert Wrapper.made == []
    assert len(kernel.blocks) == LAYERS


def test_layers_of_two_shapes_have_plans_beside_each_other(kernel: Kernel, gpu) -> None:
    step(cuda, context_of((100,)), [5], (SCORING, replace(SCORING, soft_cap=30.0)) * 2)
    used = plans.workspaces(torch.device("cuda:0")).sets[0].made
    assert [wrapper.plans[0]["logits_soft_cap"] for wrapper in used] == [0.0, 0.0, 30.0, 30.0]
    assert len(Wrapper.made) == 4


def test_a_set_is_taken_again_after_its_copies(kernel: Kernel, gpu, monkeypatch) -> None:
    told: list[tuple[int, str]] = []

    def copies(device: torch.device) -> SimpleNamespace:
        number = len({id for id, _ in told} | {-1})
        told.append((number, "made"))
        return SimpleNamespace(
            queued=lambda: told.append((number, "queued")), wait=lambda: told.append((number, "waited"))
        )

    monkeypatch.setattr(plans, "Copies", copies)
    for _ in range(3):
        step(cuda, context_of((100,)), [5])
    events = [event for event in told if event[1] != "made"]
    one, other = events[0][0], events[3][0]
    assert one != other
    a_step = ["waited", "queued", "queued"]
    assert events == [(who, what) for who in (one, other, one) for what in a_step]


def test_pageable_copies_would_show() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), Traffic() as seen:
        torch.zeros(3).to("cuda")
        torch.zeros(3).to("cuda", non_blocking=True)  # not pinned
        torch.zeros(3, device="cuda").cpu()
    assert len(seen.waits) == 3
