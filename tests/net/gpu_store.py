"""A page store on the pretended GPU, with kernels that compute there what the CPU's compute."""

from __future__ import annotations

from copy import copy
from dataclasses import fields, is_dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._pytree import tree_map

from deltastore_kernels import ops
from deltastore_kernels.basis import Basis, KeyBasis
from deltastore_kernels.context import LayerStore, Scoring, StepContext
from deltastore_kernels.layout import Format, PageLayout
from sglang_deltastore.store import steps
from sglang_deltastore.store.pages import PageStore
from sglang_deltastore.store.size import StoreSize
from tests.net.pretend_gpu import DeviceTensor, Watch, _numbers

HEADS, GROUP, HEAD_DIM, PAGE_TOKENS, LAYERS = 2, 3, 64, 32, 3
CONTEXT_TOKENS, REQUESTS, PAGES = 512, 4, 64


def on_host(x: Any) -> Any:
    """The same with host tensors, inside dataclasses too."""
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{f.name: on_host(getattr(x, f.name)) for f in fields(x) if f.init})
    return tree_map(_numbers, x)


def pretended_ops(watch: Watch) -> ops.Operations:
    """The reference operations as kernels of the pretended GPU, launched as its backends do."""
    real = ops.load("reference")

    def kernel(name: str, compute: Any) -> Any:
        def launch(*args: Any) -> Any:
            watch.launch(f"ours: {name}")
            result = compute(*[on_host(arg) for arg in args])
            return tree_map(lambda x: DeviceTensor(x) if isinstance(x, torch.Tensor) else x, result)

        return launch

    def plan_decode(step: StepContext, *rest: Any) -> Any:
        """A plan of the reference's, which launches nothing; each of its runs is attention's kernel and `leave`."""
        made = real.plan_decode(on_host(step), *on_host(rest))
        attend, leave = kernel("attend_decode", made.run), kernel("leave", _leave)

        def run(query_rot: torch.Tensor, layer: LayerStore, scoring: Scoring, basis: Basis, sink_logits: Any) -> Any:
            out_rot, lse = attend(query_rot, layer, scoring)
            return leave(out_rot, lse, query_rot, scoring, sink_logits, basis), lse

        return SimpleNamespace(run=run)

    def plan_extend(step: StepContext, *rest: Any) -> Any:
        made = real.plan_extend(on_host(step), *on_host(rest))
        return SimpleNamespace(run=kernel("attend_extend", made.run))

    names = ("rotate", "encode", "decode", "store_tokens")
    return replace(
        real,
        **{name: kernel(name, getattr(real, name)) for name in names},
        enter=kernel("enter", lambda *sides_and_basis: real.enter(*sides_and_basis[:3], _there(sides_and_basis[3]))),
        plan_decode=plan_decode,
        plan_extend=plan_extend,
    )


def _leave(out_rot: torch.Tensor, lse: torch.Tensor, *rest: Any) -> torch.Tensor:
    *rest, basis = rest
    return _there(basis).leave(out_rot, lse, *rest)


def _there(basis: Basis) -> Basis:
    """The same basis in the reference's operations, on the host."""
    made = copy(basis)
    made.__dict__ |= {name: on_host(value) for name, value in vars(basis).items()}
    made.__dict__["_rotate"] = ops.load("reference").rotate
    return made


def make_store(device: str, kernels: ops.Operations, fmt: Format, calibrated: bool, windows: bool = False) -> PageStore:
    """windows: every second layer is of the part whose pages are freed behind windows, and which lie elsewhere."""
    size = StoreSize(
        (PageLayout(fmt, HEADS, HEAD_DIM, PAGE_TOKENS),) * LAYERS, REQUESTS, CONTEXT_TOKENS,
        window_layers=tuple(windows and layer % 2 == 1 for layer in range(LAYERS)),
    )  # fmt: skip
    eye = torch.eye(HEAD_DIM).expand(HEADS, -1, -1).contiguous()
    basis = KeyBasis(torch.zeros(HEADS, HEAD_DIM), eye, eye, eye) if calibrated else None
    store = PageStore(size, PAGES, device, kernels, [basis] * LAYERS)
    if windows:
        there = torch.arange(PAGES, 0, -1).repeat_interleave(PAGE_TOKENS) * PAGE_TOKENS
        slots = torch.cat((torch.zeros(PAGE_TOKENS, dtype=torch.int64), there + torch.arange(len(there)) % PAGE_TOKENS))
        store.window_slots = DeviceTensor(slots) if device == "cuda" else slots
    return store


class Server:
    """SGLang's part of a few requests' life: the request table, lengths on the host, and steps over all layers."""

    def __init__(self, store: PageStore, device: str) -> None:
        self.store, self.device = store, device
        pages = 1 + torch.randperm(PAGES, generator=torch.Generator().manual_seed(1))
        each = PAGES // REQUESTS * PAGE_TOKENS
        slots = (pages[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).flatten().int().view(REQUESTS, each)
        table = torch.zeros(REQUESTS + 1, CONTEXT_TOKENS, dtype=torch.int32)
        table[1:] = slots[:, :CONTEXT_TOKENS]
        self.req_to_token = self._on_device(table)
        self.stored = [0] * REQUESTS
        #: by frame; two begin alike
        self.first_token = {1: 7, 2: 8, 3: 7, 4: 9}
        self.generator = torch.Generator().manual_seed(2)

    def _on_device(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.device == "cpu" else DeviceTensor(x)

    def rows(self, requests: list[int]) -> tuple[PageStore, torch.Tensor, torch.Tensor]:
        return self.store, self.req_to_token, self._on_device(torch.tensor(requests) + 1)

    def new(self, tokens: int) -> list[torch.Tensor]:
        heads = (HEADS * GROUP, HEADS, HEADS)
        return [self._on_device(torch.randn(tokens, h, HEAD_DIM, generator=self.generator)) for h in heads]

    def extend(self, new_tokens: dict[int, int]) -> list[torch.Tensor]:
        requests, counts = list(new_tokens), torch.tensor(list(new_tokens.values()))
        qkv = [self.new(int(counts.sum())) for _ in range(LAYERS)]
        prefix = torch.tensor([self.stored[r] for r in requests])
        rows, frames = self.rows(requests), [1 + r for r in requests]
        self.store.sink_table.hold({frame: self.first_token[frame] for frame in frames})
        return self._run(steps.extend, lambda: steps.plan_extend(*rows, frames, prefix, counts), qkv, new_tokens)

    def decode(self, requests: list[int]) -> list[torch.Tensor]:
        qkv = [self.new(len(requests)) for _ in range(LAYERS)]
        total = torch.tensor([self.stored[r] + 1 for r in requests])
        rows, on_device = self.rows(requests), self._on_device(total.clone())

        return self._run(steps.decode, lambda: steps.plan_decode(*rows, on_device), qkv, dict.fromkeys(requests, 1))

    def _run(self, attend: Any, plan: Any, qkv: list[list[torch.Tensor]], new: dict[int, int]) -> list[torch.Tensor]:
        before = self._launched()
        step = plan()
        self.step_kernels = self._launched() - before
        scoring = Scoring(HEAD_DIM**-0.5)
        out = []
        self.layers_kernels = []
        for layer in range(LAYERS):
            before = self._launched()
            out.append(_numbers(attend(self.store, layer, *qkv[layer], step, scoring)))
            self.layers_kernels.append(self._launched() - before)
        for request, count in new.items():
            self.stored[request] += count
        return out

    def _launched(self) -> int:
        return DeviceTensor.watch.launched if DeviceTensor.watch else 0
