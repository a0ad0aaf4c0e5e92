"""Every operation of both GPU backends against its definition, on fresh random numbers; all that must not be read is
poisoned, and what is to be written is NaN before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks.gpu.machine import Machine, relative_error, require
from benchmarks.gpu.pieces import Piece
from deltastore_kernels import ops
from deltastore_kernels.basis import Basis
from deltastore_kernels.layout import RAW, Format, PageLayout
from deltastore_kernels.ops import GPU_BACKENDS
from deltastore_kernels.shared_prefix import find_shared_prefix
from tests import budgets
from tests.kernels.attention_case import Case, gaussian, key_basis, store
from tests.kernels.paged_context import PagedContext, run_decode, run_extend
from tests.net.gpu_store import Server, make_store

TWIN = ops.load("reference")
K4V2, K4V3, K3V3, K3V2, K2V4 = (Format(*bits) for bits in ((4, 2), (4, 3), (3, 3), (3, 2), (2, 4)))
BFLOAT16 = torch.bfloat16
ODD = (1, 15, 16, 17, 97, 200)

#: the first of each operation says most; the rest follows when every operation has had its first
DECODE = [
    Case(K4V3, ODD, head_dim=128, group=4, dtype=BFLOAT16),
    Case(K4V2, (5, 17, 97, 160, 400), head_dim=128, group=4, dtype=BFLOAT16, sink_tokens=1, window_left=95),
    Case(K3V3, (97, 300), head_dim=128, group=8, dtype=BFLOAT16, soft_cap=30.0, window_left=100, page_tokens=16),
    Case(RAW, ODD, head_dim=128, group=4, dtype=BFLOAT16),
    Case(K4V2, (9000, 3, 520), head_dim=128, heads=1, group=4, dtype=BFLOAT16),
    Case(K3V2, ODD, group=3, sink_tokens=4),
    Case(K2V4, ODD, group=5, page_tokens=48, dtype=torch.float16),
    *(Case(K4V2, (97, 16), heads=1, group=group, head_dim=128, dtype=BFLOAT16) for group in (1, 16)),
    *(Case(fmt, (33, 97), heads=1, group=2, head_dim=256, dtype=BFLOAT16) for fmt in (K4V3, RAW)),
    *(Case(K4V3, (17, 97), heads=1, group=2, head_dim=head_dim, dtype=BFLOAT16) for head_dim in (32, 512)),
    *(Case(RAW, (1, 17, 97, 160), window_left=w, sink_tokens=1) for w in (0, 40)),
]
SHARED = [
    (Case(K4V3, (400, 397, 370, 130, 33, 390), head_dim=128, group=4, dtype=BFLOAT16, sink_tokens=1), 5),
    (Case(K3V2, (60, 97, 70) * 3, group=3, page_tokens=16), 3),
    (Case(RAW, (100, 97, 70), window_left=60, soft_cap=2.0, page_tokens=16, dtype=BFLOAT16), 4),
]
EXTEND = [
    (Case(K4V3, (97, 0, 40, 15, 16), head_dim=128, group=4, dtype=BFLOAT16, sink_tokens=1), (9, 30, 1, 20, 2)),
    (Case(K4V2, (0, 0), head_dim=128, group=4, dtype=BFLOAT16), (90, 17)),
    (Case(K3V3, (96, 110), window_left=40, page_tokens=16, dtype=BFLOAT16), (1, 70)),
    (Case(RAW, (100, 33), head_dim=128, dtype=BFLOAT16, soft_cap=2.0), (5, 40)),
    (Case(K4V2, (17,), heads=1, group=2), (130,)),
]
TINY_DECODE = [
    Case(K4V2, (1, 17, 40), heads=1, group=4, dtype=BFLOAT16, sink_tokens=1),
    Case(K4V2, (5, 60), heads=1, group=4, window_left=20, soft_cap=2.0, page_tokens=16),
    Case(RAW, (17,), heads=1, group=2, dtype=BFLOAT16),
]
TINY_SHARED = [(Case(K4V2, (50, 40, 33), heads=1, group=4, page_tokens=16), 2)]
TINY_EXTEND = [(Case(K4V2, (33, 0), heads=1, group=2, dtype=BFLOAT16, sink_tokens=1), (5, 18))]
CODEC = [(K4V3, 128), (K4V2, 128), (K3V2, 64), (RAW, 128), (K2V4, 256)]


def pieces(machine: Machine) -> list[Piece]:
    """The first of every operation, then the second of each, and so on."""
    codec = machine.size(CODEC, [(K4V2, 64)])
    attention = [
        [_piece("decode", backend, case, decode) for case in machine.size(DECODE, TINY_DECODE)]
        for backend in GPU_BACKENDS
    ]
    attention += [
        [
            _piece("shared prefix", backend, case, shared_prefix, pages)
            for case, pages in machine.size(SHARED, TINY_SHARED)
        ]
        for backend in GPU_BACKENDS
    ]
    attention += [
        [_piece("extend", backend, case, extend, new) for case, new in machine.size(EXTEND, TINY_EXTEND)]
        for backend in GPU_BACKENDS
    ]
    lives = [
        [Piece(f"life {fmt}{' calibrated' * calibrated} {backend}", partial(life, backend, fmt, calibrated))
         for fmt, calibrated in machine.size([(K4V3, True), (K4V2, False), (RAW, False)], [(K4V2, True)])]
        for backend in GPU_BACKENDS
    ]  # fmt: skip
    others = [
        [Piece("rotate", rotate)],
        [Piece(f"enter{' calibrated' * calibrated}", partial(enter, calibrated)) for calibrated in (True, False)],
        [Piece(f"encode {fmt} D={dim}{' shaped' * shaped}", partial(encode, fmt, dim, shaped))
         for (fmt, dim), shaped in product(codec, (False, True)) if not (shaped and fmt.is_raw)],
        [Piece(f"decode pages {fmt} D={dim} {backend}", partial(decode_pages, backend, fmt, dim))
         for (fmt, dim), backend in product(codec, GPU_BACKENDS)],
    ]  # fmt: skip
    queues = [*attention, *lives, *others]
    return [queue[i] for i in range(max(map(len, queues))) for queue in queues if i < len(queue)]


def _piece(what: str, backend: str, case: Case, check: Any, *rest: Any) -> Piece:
    return Piece(f"{what} {case} {backend}", partial(check, backend, case, *rest))


def fresh() -> int:
    """A seed nobody has tried; every row names its own."""
    return int.from_bytes(os.urandom(3), "little") + 10_000


def on(device: str, value: Any) -> Any:
    """A tensor, or a dataclass with all its tensors, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if is_dataclass(value):
        return replace(value, **{field.name: on(device, getattr(value, field.name)) for field in fields(value)})
    return value


@contextmanager
def nan_where_unwritten() -> Iterator[None]:
    """torch.empty gives NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def decode_budget(fmt: Format) -> tuple[float, float]:
    """Of outputs and LSE: the looser of both backends', and what the definition's float32 sums leave."""
    if fmt.is_raw:
        return (budgets.BACKEND_ATTEND_CUDA_RAW + budgets.BACKEND_ATTEND_FLOAT32,) * 2
    return budgets.BACKEND_ATTEND_INT15, budgets.BACKEND_ATTEND_INT15_LSE


def agree(who: str, got: Any, want: Any, budget: tuple[float, float]) -> dict[str, Any]:
    """Outputs and LSE of `got` and `want`; the worst request's error."""
    (out, lse), (want_out, want_lse) = (tuple(side.cpu().float() for side in sides) for sides in (got, want))
    rounding = budgets.BACKEND_ATTEND_ROUNDED.get(str(got[0].dtype).removeprefix("torch."), 0.0)
    errors = [relative_error(a, b) for a, b in zip(out, want_out, strict=True)]
    return {
        "error": max(require(f"{who}, outputs", error, budget[0] + rounding) for error in errors),
        "error_lse": require(f"{who}, LSE", float((lse - want_lse).abs().max()), budget[1]),
    }


def contexts(case: Case, seed: int) -> tuple[PagedContext, torch.Tensor]:
    """A fresh context of the case's shape, and queries of its dtype."""
    query = gaussian(len(case.lengths), case.heads * case.group, case.head_dim, seed=seed + 1)
    return store(case, case.kv(seed), case.kv(seed + 500)), query.to(case.dtype)


def decode(backend: str, case: Case, machine: Machine) -> dict[str, Any]:
    seed = fresh()
    context, query = contexts(case, seed)
    return {"seed": seed} | _decode(machine, backend, case, context, context, query)


def _decode(
    machine: Machine, backend: str, case: Case, context: PagedContext, told: PagedContext, query: torch.Tensor
) -> Any:
    """`told`: the context as the kernels see it."""
    want = run_decode(TWIN, query.float(), context, case.scoring)
    with nan_where_unwritten():
        device = machine.device
        got = run_decode(machine.operations(backend), on(device, query), on(device, told), case.scoring)
    return agree(f"{backend} {case}", got, want, decode_budget(case.fmt))


def shared_prefix(backend: str, case: Case, pages: int, machine: Machine) -> dict[str, Any]:
    """Those long enough begin with the first request's pages (and sink, where it has one)."""
    seed = fresh()
    context, query = contexts(case, seed)
    table = context.page_table.clone()
    members = context.packed_tokens >= pages * case.page_tokens
    table[members, :pages] = table[0, :pages]
    sinks = context.sinks
    if sinks is not None:
        sinks = replace(sinks, ids=torch.where(members, sinks.ids[0], sinks.ids))
    context = replace(context, page_table=table, sinks=sinks)
    shared = find_shared_prefix(table, context.packed_tokens, case.page_tokens)
    require("requests that share, too few", float(shared.pages.count_nonzero() < 2), 0)
    return {"seed": seed} | _decode(machine, backend, case, context, replace(context, shared=shared), query)


def extend(backend: str, case: Case, new_tokens: tuple[int, ...], machine: Machine) -> dict[str, Any]:
    seed = fresh()
    context, _ = contexts(case, seed)
    heads = (case.heads * case.group, case.heads, case.heads)
    new = [gaussian(sum(new_tokens), h, case.head_dim, seed=seed + 2 + i).to(case.dtype) for i, h in enumerate(heads)]
    want = run_extend(TWIN, *(side.float() for side in new), list(new_tokens), context, case.scoring)
    told = replace(context, stored_tokens=list(case.lengths))
    with nan_where_unwritten():
        device = machine.device
        got = run_extend(
            machine.operations(backend), *on_all(device, new), list(new_tokens), on(device, told), case.scoring
        )
    allowed = budgets.EXTEND_DECODED_TO_16_BITS, budgets.EXTEND_DECODED_TO_16_BITS_LSE
    return {"seed": seed} | agree(f"{backend} {case}", got, want, allowed)


def on_all(device: str, tensors: Any) -> list[torch.Tensor]:
    return [tensor.to(device) for tensor in tensors]


def rotate(machine: Machine) -> dict[str, Any]:
    seed, worst = fresh(), 0.0
    for dtype, head_dim in product((torch.float32, torch.float16, BFLOAT16), machine.size((32, 64, 128, 256), (64,))):
        x = gaussian(37, 3, head_dim, seed=seed).to(dtype)
        got = machine.operations("triton").rotate(x.to(machine.device)[:, 1:])
        rounding = budgets.BACKEND_ATTEND_ROUNDED.get(str(dtype).removeprefix("torch."), 0.0)
        error = relative_error(got.cpu(), TWIN.rotate(x[:, 1:]))
        worst = max(worst, require(f"{dtype} D={head_dim}", error, budgets.BACKEND_ROTATE + rounding))
    return {"seed": seed, "error": worst}


def enter(calibrated: bool, machine: Machine) -> dict[str, Any]:
    """Of slices of one product, and heads narrower than they are stored."""
    seed, worst = fresh(), 0.0
    for dtype, (dim, head_dim) in product(
        (torch.float32, torch.float16, BFLOAT16),
        machine.size(((64, 64), (128, 128), (80, 128), (256, 256)), ((48, 64),)),
    ):
        layout, fitted = (
            PageLayout(RAW, 2, head_dim, 16, dim, dim),
            key_basis(2, dim, seed=seed) if calibrated else None,
        )
        sides = gaussian(70, 10, dim, seed=seed).to(dtype).split((6, 2, 2), 1)
        operations = machine.operations("triton")
        ours = Basis(operations, fitted and fitted.to(machine.device), layout)
        got = operations.enter(*on_all(machine.device, sides), ours)
        rounding = budgets.BACKEND_ATTEND_ROUNDED.get(str(dtype).removeprefix("torch."), 0.0)
        allowed = (budgets.BACKEND_BASIS if calibrated else budgets.BACKEND_ROTATE) + rounding
        for side, want in zip(got, TWIN.enter(*sides, Basis(TWIN, fitted, layout)), strict=True):
            error = relative_error(side.cpu().float(), want.float())
            worst = max(worst, require(f"{dtype} {dim} in {head_dim}", error, allowed))
    return {"seed": seed, "error": worst}


def encode(fmt: Format, head_dim: int, shaped: bool, machine: Machine) -> dict[str, Any]:
    """Into pages full of 0xFF; some tiles go nowhere."""
    seed, heads, tiles = fresh(), machine.size(8, 1), machine.size(40, 3)
    layout = PageLayout(fmt, heads, head_dim, 64)
    sides = [
        gaussian(tiles, heads, 16, head_dim, seed=seed + i) * gaussian(tiles, heads, 16, 1, seed=seed + 8 + i).exp()
        for i in range(2)
    ]
    page_ids = torch.arange(tiles) // layout.tiles
    page_ids[1] = -1
    tile_ids = torch.arange(tiles) % layout.tiles
    shaping = key_basis(heads, head_dim, seed=seed).shaping if shaped else None
    want = torch.full((tiles, layout.page_bytes), 255, dtype=torch.uint8)
    got = want.to(machine.device, copy=True)
    TWIN.encode(*sides, page_ids, tile_ids, want, layout, shaping)
    on_device = on_all(machine.device, (*sides, page_ids, tile_ids))
    machine.operations("triton").encode(*on_device, got, layout, on(machine.device, shaping))
    return {"seed": seed, "share_of_bytes_that_differ": same_bytes(f"encode {fmt}", got, want, (want != 255).sum())}


def same_bytes(who: str, got: torch.Tensor, want: torch.Tensor, of: Any) -> float:
    return require(who, float((got.cpu() != want).sum() / of), budgets.GPU_ENCODED_BYTES_DIFFER)


def decode_pages(backend: str, fmt: Format, head_dim: int, machine: Machine) -> dict[str, Any]:
    seed = fresh()
    layout = PageLayout(fmt, machine.size(4, 1), head_dim, 48)
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randint(0, 256, (5, layout.page_bytes), generator=generator).to(torch.uint8)
    if fmt.is_raw:
        pages = gaussian(5, layout.page_bytes // 2, seed=seed).half().view(torch.uint8)
    ids = torch.tensor([4, 0, 2][: machine.size(3, 1)])
    want = TWIN.decode(pages, ids, layout)
    with nan_where_unwritten():
        got = machine.operations(backend).decode(*on_all(machine.device, (pages, ids)), layout)
    errors = [float(((a.cpu() - b).abs() / b.abs().clamp_min(1e-30)).max()) for a, b in zip(got, want, strict=True)]
    return {"seed": seed, "error": require(f"decode {fmt}", max(errors), budgets.BACKEND_DECODE_EXP2)}


class DeviceServer(Server):
    """A few requests' life over a store on the machine."""

    def _on_device(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.device)


def life(backend: str, fmt: Format, calibrated: bool, machine: Machine) -> dict[str, Any]:
    """Prompts, tokens, prompts behind them, over tiles' and pages' ends: outputs, pages and frames of all layers."""
    seed = fresh()
    servers = [
        DeviceServer(make_store(machine.device, machine.operations(backend), fmt, calibrated), machine.device),
        Server(make_store("cpu", TWIN, fmt, calibrated), "cpu"),
    ]
    for server in servers:
        server.generator.manual_seed(seed)
        for pages in server.store.pages:
            pages.fill_(255)
    ours, twin = servers
    steps: list[tuple[str, Any]] = [("extend", {0: 30, 1: 14}), *[("decode", [0, 1])] * machine.size(20, 2)]
    steps += machine.size([("extend", {0: 64, 2: 100, 3: 0}), *[("decode", [0, 1, 2])] * 20], [])
    steps += [("extend", {1: 5})]
    worst = 0.0
    for number, (what, who) in enumerate(steps):
        for got, want in zip(getattr(ours, what)(who), getattr(twin, what)(who), strict=True):
            error = relative_error(got.cpu(), want)
            worst = max(worst, require(f"step {number}, {what} {who}", error, budgets.EXTEND_DECODED_TO_16_BITS))
    written = sum((pages != 255).sum() for pages in twin.store.pages)
    got_pages, want_pages = (torch.stack([p.cpu() for p in server.store.pages]) for server in servers)
    for name in ("frame_key_rot", "frame_value_rot", "sink_key_rot"):
        for got, want in zip(getattr(ours.store, name), getattr(twin.store, name), strict=True):
            rows = slice(1, None)  # 0 takes what belongs to nobody
            error = float((got[rows].cpu() - want[rows]).abs().max()) if want[rows].numel() else 0.0
            require(name, error, budgets.GPU_FRAMES_DIFFER)
    return {
        "seed": seed,
        "steps": len(steps),
        "error": worst,
        "share_of_bytes_that_differ": same_bytes("pages", got_pages, want_pages, written),
    }
