"""A whole model's decode steps: Llama 3 8B's shapes with random weights, every layer, under a CUDA graph; over our
store as a server plans and runs it, packed and raw, and over bf16 in one piece, all else the same.

Before anything is timed, one step is taken whose every layer's attention is compared with its definition on the same
inputs; and a graph's steps must give the tokens and the pages that the same steps give without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from benchmarks.gpu.decode import BACKENDS, LARGEST_ERROR, PAGE_TOKENS, SDPA, Shape, attend_float32, random_pages
from benchmarks.gpu.machine import Machine, relative_error, require
from benchmarks.gpu.pieces import Piece
from deltastore_kernels.context import LayerStore, Scoring, StepContext
from deltastore_kernels.layout import RAW, TILE_TOKENS, Format, PageLayout
from deltastore_kernels.ops.attend_decode import reference
from sglang_deltastore.store import steps
from sglang_deltastore.store.pages import PageStore
from sglang_deltastore.store.size import StoreSize

STEPS = 2 * TILE_TOKENS
"""Timed steps: every request completes two tiles in them."""
FORMATS = {str(fmt): fmt for fmt in (Format(4, 3), Format(4, 2), RAW)}


@dataclass(frozen=True)
class Config:
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


LLAMA_3_8B = Config(32, 4096, 14336, 32, 8, 128, 128256)
SMALL = Config(2, 256, 512, 8, 2, 128, 1000)
TINY = Config(2, 64, 64, 2, 1, 64, 50)


class Cache(Protocol):
    """Where keys and values are, and attention over them; `begin` plans a step for all layers."""

    def begin(self) -> None: ...

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [B, Hq, D], key, value [B, H, D]: one new token for each request -> [B, Hq, D]."""

    def checked(self) -> Any:
        """A context inside which every layer's attention is compared with its definition."""


class Model:
    """Random weights, of the size that keeps activations near one."""

    def __init__(self, config: Config, machine: Machine) -> None:
        self.config, generator = config, machine.generator(7)
        c = config
        shapes = {
            "qkv": ((c.heads + 2 * c.kv_heads) * c.head_dim, c.hidden), "out": (c.hidden, c.heads * c.head_dim),
            "up": (2 * c.intermediate, c.hidden), "down": (c.hidden, c.intermediate),
        }  # fmt: skip

        def weight(shape: tuple[int, int]) -> torch.Tensor:
            random = torch.randn(shape, device=machine.device, generator=generator, dtype=torch.bfloat16)
            return random.mul_(shape[1] ** -0.5)

        self.layers = [{name: weight(shape) for name, shape in shapes.items()} for _ in range(c.layers)]
        self.embedding = weight((c.vocabulary, c.hidden)) * c.hidden**0.5
        self.head = weight((c.vocabulary, c.hidden))
        self.inverse_frequency = 5e5 ** -(torch.arange(0, c.head_dim, 2, device=machine.device) / c.head_dim)

    def step(self, tokens: torch.Tensor, positions: torch.Tensor, cache: Cache) -> torch.Tensor:
        """tokens, positions [B] -> the next tokens [B]."""
        c = self.config
        angle = positions[:, None].float() * self.inverse_frequency
        cos, sin = angle.cos()[:, None].bfloat16(), angle.sin()[:, None].bfloat16()
        hidden = self.embedding[tokens]
        cache.begin()
        for number, weights in enumerate(self.layers):
            qkv = linear(rms_norm(hidden, (c.hidden,)), weights["qkv"]).unflatten(-1, (-1, c.head_dim))
            query, key, value = qkv.split((c.heads, c.kv_heads, c.kv_heads), 1)
            out = cache.attend(number, _turned(query, cos, sin), _turned(key, cos, sin), value)
            hidden = hidden + linear(out.flatten(1), weights["out"])
            gate, up = linear(rms_norm(hidden, (c.hidden,)), weights["up"]).chunk(2, -1)
            hidden = hidden + linear(silu(gate) * up, weights["down"])
        return linear(rms_norm(hidden, (c.hidden,)), self.head).argmax(-1)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of [B, heads, D]."""
    one, other = x.chunk(2, -1)
    return torch.cat((one * cos - other * sin, other * cos + one * sin), -1)


class OurCache:
    """A page store behind a request table, planned as the seam plans a decode step (seam/backend.py). Contexts are of
    random codes; `total_tokens` counts the new token of the step that comes."""

    def __init__(self, backend: str, fmt: Format, config: Config, shape: Shape, machine: Machine) -> None:
        layout = PageLayout(fmt, config.kv_heads, config.head_dim, PAGE_TOKENS)
        spare = -(-4 * STEPS // PAGE_TOKENS)  # pages for what the steps add
        each = shape.context_tokens // PAGE_TOKENS + spare
        size = StoreSize((layout,) * config.layers, shape.batch, each * PAGE_TOKENS)
        machine.need_bytes(size.page_bytes * each * shape.batch * 1.2 + _weights_bytes(config), str(shape))
        self.store = PageStore(size, each * shape.batch, machine.device, machine.operations(backend))
        generator = machine.generator(8)
        for pages in self.store.pages:
            pages.copy_(random_pages(layout, len(pages), generator))
        ids = 1 + torch.randperm(each * shape.batch, device=machine.device, generator=generator).view(shape.batch, each)
        table = (ids[..., None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS, device=machine.device)).flatten(1).int()
        self.req_to_token = torch.cat((torch.zeros_like(table[:1]), table))
        self.rows = torch.arange(1, shape.batch + 1, device=machine.device)
        self.total_tokens = torch.full((shape.batch,), shape.context_tokens + 1, device=machine.device)
        self.scoring = Scoring(config.head_dim**-0.5)

    def begin(self) -> None:
        self.plan = steps.plan_decode(self.store, self.req_to_token, self.rows, self.total_tokens)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return steps.decode(self.store, layer, query, key, value, self.plan, self.scoring)

    @contextmanager
    def checked(self) -> Iterator[list[float]]:
        operations, errors = self.store.ops, []
        self.store.ops = replace(operations, plan_decode=partial(_CheckedPlan, operations.plan_decode, errors))
        yield errors
        self.store.ops = operations


class _CheckedPlan:
    """A plan and its twin."""

    def __init__(self, make: Any, errors: list[float], step: StepContext, bounds: LayerStore | None = None) -> None:
        self._plan, self._twin, self._errors = make(step, bounds), reference.DecodePlan(step), errors

    def run(self, query_rot: torch.Tensor, layer: LayerStore, scoring: Scoring, *leaving: Any) -> Any:
        got = self._plan.run(query_rot, layer, scoring, *leaving)
        want = self._twin.run(query_rot.float(), layer, scoring, *leaving)[0]
        self._errors.append(require(f"layer {len(self._errors)}", relative_error(got[0], want), LARGEST_ERROR))
        return got


class Bf16Cache:
    """Keys and values in one piece for each request and layer, attended to by torch's SDPA. A step overwrites the last
    token, so that all steps have one length: a page table, and lengths that grow, would cost more."""

    def __init__(self, config: Config, shape: Shape, machine: Machine) -> None:
        size = shape.batch, config.kv_heads, shape.context_tokens + 1, config.head_dim
        self.shape, self.errors = shape, None
        all_bytes = 4 * config.layers * shape.batch * size[2] * config.kv_heads * config.head_dim
        machine.need_bytes(1.1 * all_bytes + _weights_bytes(config), f"{shape} in bf16")
        generator = machine.generator(9)
        self.sides = [
            [torch.randn(size, device=machine.device, generator=generator, dtype=torch.bfloat16) for _ in range(2)]
            for _ in range(config.layers)
        ]
        self.total_tokens = torch.full((shape.batch,), shape.context_tokens + 1, device=machine.device)

    def begin(self) -> None: ...

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        for stored, new in zip(self.sides[layer], (key, value), strict=True):
            stored[:, :, -1] = new
        grouped = query.unflatten(1, (self.shape.kv_heads, self.shape.gqa))
        out = scaled_dot_product_attention(grouped, *self.sides[layer]).flatten(1, 2)
        if self.errors is not None:
            sides = zip(query, *self.sides[layer], strict=True)
            want = torch.stack([attend_float32(*each, self.shape) for each in sides])
            self.errors.append(require(f"layer {layer}", relative_error(out, want), LARGEST_ERROR))
        return out

    @contextmanager
    def checked(self) -> Iterator[list[float]]:
        self.errors = errors = []
        yield errors
        self.errors = None


def _weights_bytes(config: Config) -> float:
    c = config
    a_layer = c.hidden * ((2 * c.heads + 2 * c.kv_heads) * c.head_dim + 3 * c.intermediate)
    return 2 * (c.layers * a_layer + 2 * c.vocabulary * c.hidden)


class Loop:
    """The steps of one model over one cache; each token is fed back, in place, as a CUDA graph needs it."""

    def __init__(self, model: Model, cache: Any, batch: int, machine: Machine) -> None:
        self.model, self.cache = model, cache
        self.tokens = torch.arange(batch, device=machine.device) % model.config.vocabulary

    def step(self) -> None:
        total = self.cache.total_tokens
        self.tokens.copy_(self.model.step(self.tokens, total - 1, self.cache))
        if isinstance(self.cache, OurCache):
            total += 1


def shape_of(config: Config, batch: int, context_tokens: int) -> Shape:
    return Shape(batch, context_tokens, config.kv_heads, config.heads // config.kv_heads, config.head_dim)


def graph_pieces(machine: Machine) -> list[Piece]:
    return [
        Piece(f"graph {name} {kernel}", partial(same_under_a_graph, kernel, fmt))
        for name, fmt in list(FORMATS.items())[: machine.size(2, 1)]
        for kernel in BACKENDS
    ]


@torch.inference_mode()
def same_under_a_graph(kernel: str, fmt: Format, machine: Machine) -> dict[str, Any]:
    """Over a tile's end."""
    config = machine.size(SMALL, TINY)
    shape, count = shape_of(config, *machine.size((5, 512), (2, 64))), machine.size(STEPS, 2)
    model, found = Model(config, machine), []
    for captured in (False, True):
        loop = Loop(model, OurCache(BACKENDS[kernel], fmt, config, shape, machine), shape.batch, machine)
        warm_up = loop.step
        if captured:
            replay = machine.captured(loop.step)
        else:
            warm_up()
            replay = loop.step
        tokens = []
        for _ in range(count):
            replay()
            tokens.append(loop.tokens.clone())
        found.append((torch.stack(tokens), torch.stack(loop.cache.store.pages), loop.cache.total_tokens))
    for eager, replayed, what in zip(*found, ("tokens", "pages", "lengths"), strict=True):
        require(f"{what} of a graph and without one", float((eager != replayed).sum()), 0)
    return {"kernel": kernel, "format": str(fmt), "steps": count, "different_tokens": len(found[0][0].unique())}


CASES = [(1, 32768), (32, 8192), (1, 131072), (128, 1024), (64, 4096), (8, 65536)]


def pieces(machine: Machine) -> list[Piece]:
    model = machine.size("Llama 3 8B", "a tiny model")
    contestants = [SDPA, *(f"{kernel} {fmt}" for fmt in FORMATS for kernel in BACKENDS)]
    return [
        Piece(f"{model}, batch {batch}, context {context}, {name}", partial(loop_of, name, batch, context))
        for batch, context in machine.size(CASES, [(2, 64)])
        for name in contestants[: machine.size(9, 3)]
    ]


@torch.inference_mode()
def loop_of(name: str, batch: int, context_tokens: int, machine: Machine) -> dict[str, Any]:
    config = machine.size(LLAMA_3_8B, TINY)
    shape = shape_of(config, batch, context_tokens)
    if name == SDPA:
        cache: Any = Bf16Cache(config, shape, machine)
    else:
        kernel, fmt = name.split()
        cache = OurCache(BACKENDS[kernel], FORMATS[fmt], config, shape, machine)
    loop = Loop(Model(config, machine), cache, batch, machine)
    with cache.checked() as errors:
        loop.step()
    require("layers checked", abs(len(errors) - config.layers), 0)
    facts = {"kernel": name, **asdict(shape), "layers": config.layers, "error": max(errors)}
    us = _mean_us(loop.step, machine)
    return facts if us is None else facts | {"ms_a_step": us / 1e3, "tokens_per_s": batch / us * 1e6, "steps": STEPS}


def _mean_us(step: Callable[[], None], machine: Machine) -> float | None:
    """Of whole tiles' steps, so that their encoding counts as it does in a server's life. Weights flush L2."""
    replay = machine.captured(step)
    count = machine.size(STEPS, 1)
    times = [machine.elapsed_us(replay) for _ in range(count)]
    return None if machine.rehearsed else sum(times) / count
