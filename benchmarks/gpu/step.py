"""A whole decode step by calculation: every kernel that DeltaStore launches for it, and how long each takes at best.

What is launched is not assumed: a step's plan and a layer run on a GPU that is not there (tests/net/pretend_gpu.py)
through the product's own Python, with the CUDA and Triton kernels replaced by what notes their launch. Each kernel
takes what its bytes take at the memory's peak rate; attention what its machine code's instructions take where that is
more (roofline.py), and what stores tokens the instructions of its way through calibrated keys' dims besides; none less
than a small kernel takes under a CUDA graph. Nothing here was run on a GPU.

Stock is credited with two kernels a layer, attention over bf16 or fp8 keys and values and the write of the new ones,
at the memory's peak rate, and with no plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.roofline import GPUS, TOKENS_AND_HEADS, bytes_per_token
from deltastore_kernels import cuda_build, ops
from deltastore_kernels.basis import KeyBasis, plain_key_basis
from deltastore_kernels.context import Scoring
from deltastore_kernels.layout import TILE_TOKENS, Format, PageLayout
from deltastore_kernels.ops import _triton_leave
from deltastore_kernels.ops.attend_decode import cuda as attend_decode
from deltastore_kernels.ops.attend_decode import triton as attend_decode_triton
from deltastore_kernels.ops.encode import triton as encode
from deltastore_kernels.ops.enter import triton as enter
from deltastore_kernels.ops.store_tokens import triton as store_tokens
from sglang_deltastore.store import steps
from sglang_deltastore.store.pages import PageStore
from sglang_deltastore.store.size import StoreSize
from tests.net.pretend_gpu import DeviceTensor, Watch, pretend_gpu

ARCHITECTURE = "sm_90"
MULTIPROCESSORS = 132
PAGE_TOKENS = 64
TABLE_TOKENS = 131072
"""SGLang's request table is as wide as the longest context that the server takes, whatever the batch's lengths are."""
SMALL_KERNEL_US = 2.0
"""A kernel with next to nothing to do, from one to the next under a CUDA graph (tests/budgets.py)."""


@dataclass(frozen=True)
class Model:
    """Attention of one GPU's share."""

    name: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int


MODELS = (
    Model("Llama-3-8B", 32, 32, 8, 128),
    Model("Qwen3-32B, TP 4", 64, 16, 2, 128),
    Model("Qwen3-30B-A3B", 48, 32, 4, 128),
)
BATCHES, CONTEXTS = (1, 32, 256), (1024, 16384, 131072)
FORMATS = (Format(4, 3), Format(4, 2))


ATTEND, STORE = "attend_decode", "store_tokens"
ShapingLoop = dict[int, int]
"""Tokens that a program shapes at once (`encode.shaped_at_once`) -> warp instructions for each of their dims."""


@dataclass(frozen=True)
class Launch:
    """A kernel, and the bytes that it moves, but for what attention reads of the context."""

    kernel: str
    bytes: float

    def us(self, issue_us: dict[str, float]) -> float:
        by_bytes = self.bytes / GPUS[ARCHITECTURE].memory_bytes_per_us
        return max(SMALL_KERNEL_US, by_bytes + issue_us.get(self.kernel, 0))


@dataclass(frozen=True)
class Step:
    """`once`: of a step, whatever the layers are: its plan, and what the first layer's write makes for the others."""

    once: list[Launch]
    layer: list[Launch]


def traced(model: Model, batch: int, fmt: Format, backend: str = "flashinfer", calibrated: bool = True) -> Step:
    """What a step of `batch` requests launches, one GPU's share."""
    with pretend_gpu() as watch, _noting_kernels(watch):
        layout = PageLayout(fmt, model.kv_heads, model.head_dim, PAGE_TOKENS)
        bases = [_any_basis(model) if calibrated else None] * 2
        store = PageStore(StoreSize((layout,) * 2, batch, TABLE_TOKENS), 1, "cuda", ops.load(backend, "cuda"), bases)
        table = DeviceTensor(torch.zeros(batch + 1, TABLE_TOKENS, dtype=torch.int32))
        rows = DeviceTensor(1 + torch.arange(batch))
        total = DeviceTensor(torch.full((batch,), 1000))
        widths = (model.query_heads, model.kv_heads, model.kv_heads)
        qkv = DeviceTensor(torch.zeros(batch, sum(widths), model.head_dim, dtype=torch.bfloat16))
        query, key, value = qkv.split(widths, 1)  # views of one product, as models have them
        scoring = Scoring(model.head_dim**-0.5)
        _launched(watch)
        plan = steps.plan_decode(store, table, rows, total)
        of_plan = _launched(watch)
        layers = []
        for layer in range(2):
            steps.decode(store, layer, query, key, value, plan, scoring)
            layers.append(_launched(watch))
    return Step(of_plan + _more(*layers), layers[1])


def _any_basis(model: Model) -> KeyBasis:
    return plain_key_basis(model.kv_heads, model.head_dim, torch.device("cpu"))


def _launched(watch: Watch) -> list[Launch]:
    """What was launched since the last call."""
    found = [Launch(name, moved) for name, moved in watch.launches]
    watch.launches.clear()
    return found


def _more(first: list[Launch], second: list[Launch]) -> list[Launch]:
    """What the first layer launches that the second does not."""
    return list((Counter(first) - Counter(second)).elements())


class _Noted:
    """A Triton kernel, launched as kernel[grid](...): notes its name and bytes."""

    def __init__(self, watch: Watch, name: str, moved: Callable[..., float]) -> None:
        self._watch, self._name, self._moved = watch, name, moved

    def __getitem__(self, _grid: Any) -> _Noted:
        return self

    def __call__(self, *tensors: Any, **_constants: Any) -> None:
        self._watch.launch(self._name, self._moved(*tensors))


def _noting_kernels(watch: Watch) -> ExitStack:
    """Our kernels, each as a launch with its bytes, but for what attention reads of the context: that is the cell's."""

    def attend(query: torch.Tensor, *rest: Any) -> None:
        watch.launch(ATTEND, attended(query, *rest[10:12]))

    def attended(query: torch.Tensor, partial_out: torch.Tensor, partial_log2: torch.Tensor, *_: Any) -> float:
        return query.nbytes + partial_out.nbytes + partial_log2.nbytes

    def entered(*given: Any) -> float:
        """Queries, keys and values, what they become, and a calibration's matrices and mean, where they are read."""
        query, key, value, *_, query_rotation, key_rotation, mean, _, _ = given
        matrices = 0 if query_rotation is query else sum(x.nbytes for x in (query_rotation, key_rotation, mean))
        return 2 * (query.nbytes + key.nbytes + value.nbytes) + matrices

    def stored(*given: Any) -> float:
        """Each token once into its frame. One request in sixteen completes a tile; the others' programs end at once."""
        key, value, pages, frame, shaping = (given[i] for i in (3, 4, 18, 19, 23))
        tile_bytes = 2 * frame[0].nbytes + pages.shape[1] * TILE_TOKENS / PAGE_TOKENS
        shaping_bytes = shaping.nbytes * min(1, len(key) / TILE_TOKENS)
        return 2 * (key.nbytes + value.nbytes) + tile_bytes * len(key) / TILE_TOKENS + shaping_bytes

    def left(partial_out: torch.Tensor, partial_log2: torch.Tensor, *rest: Any) -> float:
        out, lse = rest[4:6]
        return partial_out.nbytes + partial_log2.nbytes + out.nbytes + lse.nbytes

    stack = ExitStack()
    module = SimpleNamespace(attend_decode=attend)
    tables = (DeviceTensor(torch.zeros(1)),) * 2
    for target, name, replaced in (
        (cuda_build, "load", lambda kernels: module),
        (attend_decode, "_multiprocessors", lambda device: MULTIPROCESSORS),
        (attend_decode_triton, "_multiprocessors", lambda device: MULTIPROCESSORS),
        (attend_decode_triton, "generation", lambda device: 9),
        (attend_decode_triton, "attend_own", _Noted(watch, ATTEND, attended)),
        (attend_decode_triton, "attend_shared", _Noted(watch, "attend_shared", lambda query, *_: query.nbytes)),
        (enter, "enter_rows", _Noted(watch, "enter", entered)),
        (store_tokens, "store_rows", _Noted(watch, STORE, stored)),
        (_triton_leave, "leave_row", _Noted(watch, "leave", left)),
        (encode, "_tables", lambda bits, device: tables),
    ):
        stack.enter_context(mock.patch.object(target, name, replaced))
    return stack


def shaping_us(model: Model, batch: int, instructions: ShapingLoop) -> float:
    """Of a layer, on average over steps: a request in sixteen completes a tile, whose keys' dims are rounded one after
    the other. Either one warp's way through them counts, or the issue of all warps' instructions."""
    tiles, gpu = max(1, batch / TILE_TOKENS) * model.kv_heads, GPUS[ARCHITECTURE]
    own = encode.shaped_at_once(-(-batch // TILE_TOKENS) * model.kv_heads)
    warps = tiles * TILE_TOKENS / own * encode.launch(model.head_dim)["num_warps"]
    rounds = max(1, warps / gpu.schedulers)
    any_completes = 1 - (1 - 1 / TILE_TOKENS) ** batch
    return any_completes * rounds * instructions[own] * model.head_dim / gpu.cycles_per_us


def rows(
    attention_row: Callable[[Format, int], dict[str, Any]], shaping_loop: Callable[[Format, int], ShapingLoop]
) -> Iterator[dict[str, Any]]:
    """One for each model, batch, context and format. `attention_row`: static_report's of the CUDA decode kernel;
    `shaping_loop`: of the Triton kernel that stores tokens."""
    for model, batch, fmt in product(MODELS, BATCHES, FORMATS):
        step = traced(model, batch, fmt)
        limits = attention_row(fmt, model.head_dim)["roofline"]
        shaped_us = shaping_us(model, batch, shaping_loop(fmt, model.head_dim))
        stored = bytes_per_token(PageLayout(fmt, model.kv_heads, model.head_dim, PAGE_TOKENS))
        for context in CONTEXTS:
            tokens = batch * context * model.kv_heads
            attention_us = limits["us"] * tokens / TOKENS_AND_HEADS
            issue_us = {ATTEND: attention_us, STORE: shaped_us}
            once, layer = (sum(launch.us(issue_us) for launch in part) for part in (step.once, step.layer))
            shaping = sum(launch.us(issue_us) - launch.us({ATTEND: attention_us}) for launch in step.layer)
            bf16_us, fp8_us = (stock_us(model, batch, tokens, element_bytes) for element_bytes in (2, 1))
            us = once + model.layers * layer
            yield {
                "kernel": "decode step", "calculated": True, "model": model.name, "batch": batch,
                "context_tokens": context, "format": str(fmt), "gpu": GPUS[ARCHITECTURE].name,
                "layers": model.layers, "kernels_a_layer": len(step.layer), "kernels_once": len(step.once),
                "us": us, "once_us": once, "shaping_us": model.layers * shaping,
                "attention_us": model.layers * max(SMALL_KERNEL_US, attention_us),
                "attention_bytes": stored * tokens * model.layers, "attention_limit": limits["limit"],
                "layer": [{"kernel": each.kernel, "bytes": each.bytes, "us": each.us(issue_us)}
                          for each in step.layer],
                "stock_bf16_us": bf16_us, "stock_fp8_us": fp8_us,
                "x_of_bf16": bf16_us / us, "x_of_fp8": fp8_us / us,
            }  # fmt: skip


def stock_us(model: Model, batch: int, tokens: int, element_bytes: int) -> float:
    """Of a step: attention over `tokens` of all KV heads, and the write of the new ones, in every layer."""
    memory = GPUS[ARCHITECTURE].memory_bytes_per_us
    read = 2 * element_bytes * model.head_dim * tokens
    written = 2 * batch * model.kv_heads * model.head_dim * (2 + element_bytes)  # from bfloat16
    return model.layers * sum(max(SMALL_KERNEL_US, moved / memory) for moved in (read, written))
