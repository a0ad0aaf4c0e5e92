"""The rest of a layer's work: rotating and storing new tokens, and attention of prompts behind what is stored, beside
torch's SDPA over bf16 in one piece. Llama 3 8B's heads; answers checked first."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.correctness import same_bytes
from benchmarks.gpu.decode import BACKENDS, LARGEST_ERROR, PAGE_TOKENS, SDPA, Shape, packed_context
from benchmarks.gpu.machine import Machine, relative_error, require
from benchmarks.gpu.pieces import Piece
from benchmarks.gpu.roofline import bytes_per_token
from deltastore_kernels import ops
from deltastore_kernels.basis import Basis
from deltastore_kernels.context import LayerStore
from deltastore_kernels.layout import TILE_TOKENS, Format
from deltastore_kernels.ops._attention import attend_rows
from deltastore_kernels.ops.attend_extend import reference
from sglang_deltastore.store.writes import plan_decode_writes, plan_writes
from tests import budgets
from tests.kernels.attention_case import key_basis

K4V3 = Format(4, 3)
TWIN = ops.load("reference")


@dataclass(frozen=True)
class Prompt:
    """`new_tokens` behind `prefix_tokens` of each of `batch` requests."""

    batch: int
    prefix_tokens: int
    new_tokens: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.new_tokens} behind {self.prefix_tokens}"


EXTENDS = [
    Prompt(1, 16384, 32), Prompt(1, 0, 4096), Prompt(1, 131072, 32), Prompt(8, 8192, 256), Prompt(1, 32768, 4096),
    Prompt(32, 2048, 64),
]  # fmt: skip
HEADS = {"kv_heads": 8, "gqa": 4, "head_dim": 128}
TINY_HEADS = {"kv_heads": 1, "gqa": 2, "head_dim": 64}


def pieces(machine: Machine) -> list[Piece]:
    tokens = machine.size(((64, True), (1, True), (4096, False)), ((2, True), (33, False)))
    stores = [
        Piece(f"store {count} {'requests, a token each' if decoding else 'tokens'}{' calibrated' * shaped}",
              partial(store, count, decoding, shaped))
        for count, decoding in tokens for shaped in (False, True)
    ]  # fmt: skip
    extends = [
        Piece(f"extend {prompt} {kernel}", partial(extend, kernel, prompt))
        for prompt in machine.size(EXTENDS, [Prompt(1, 64, 5)])
        for kernel in (SDPA, *BACKENDS)
    ]
    counts = machine.size((64, 4096), (3,))
    rotates = [Piece(f"rotate {count} tokens", partial(rotate, count)) for count in counts]
    enters = [
        Piece(f"enter {count} tokens{' calibrated' * calibrated}", partial(enter, count, calibrated))
        for count in counts for calibrated in (False, True)
    ]  # fmt: skip
    return [*stores, *enters, *extends, *rotates]


def enter(tokens: int, calibrated: bool, machine: Machine) -> dict[str, Any]:
    """Queries, keys and values of one layer, slices of one product."""
    shape = Shape(1, PAGE_TOKENS, **machine.size(HEADS, TINY_HEADS))
    widths = (shape.kv_heads * shape.gqa, shape.kv_heads, shape.kv_heads)
    size = tokens, sum(widths), shape.head_dim
    qkv = torch.randn(size, device=machine.device, generator=machine.generator(3)).bfloat16()
    sides, operations, layout = qkv.split(widths, 1), machine.operations("triton"), shape.layout(K4V3)
    fitted = key_basis(shape.kv_heads, shape.head_dim, seed=5).to(machine.device) if calibrated else None
    basis, want = Basis(operations, fitted, layout), TWIN.enter(*sides, Basis(TWIN, fitted, layout))
    allowed = (budgets.BACKEND_BASIS if calibrated else budgets.BACKEND_ROTATE) + budgets.BACKEND_ATTEND_ROUNDED[
        "bfloat16"
    ]
    got = operations.enter(*sides, basis)
    error = max(require("enter", relative_error(*pair), allowed) for pair in zip(got, want, strict=True))
    facts = {"tokens": tokens, "calibrated": calibrated, "error": error}
    return facts | machine.timed(lambda: operations.enter(*sides, basis), 2 * qkv.nbytes)


def rotate(tokens: int, machine: Machine) -> dict[str, Any]:
    shape = Shape(1, PAGE_TOKENS, **machine.size(HEADS, TINY_HEADS))
    size = tokens, shape.kv_heads * shape.gqa, shape.head_dim
    query = torch.randn(size, device=machine.device, generator=machine.generator(3)).bfloat16()
    rotated = machine.operations("triton").rotate
    allowed = budgets.BACKEND_ROTATE + budgets.BACKEND_ATTEND_ROUNDED["bfloat16"]
    error = require("rotate", relative_error(rotated(query), TWIN.rotate(query)), allowed)
    return {"tokens": tokens, "error": error} | machine.timed(lambda: rotated(query), 2 * query.nbytes)


def store(tokens: int, decoding: bool, shaped: bool, machine: Machine) -> dict[str, Any]:
    """Decoding: a token for each of so many requests, every one of which completes its tile. Else one prompt."""
    requests = tokens if decoding else 1
    context = PAGE_TOKENS if decoding else -(-tokens // PAGE_TOKENS) * PAGE_TOKENS
    shape = Shape(requests, context, **machine.size(HEADS, TINY_HEADS))
    step, layer = packed_context(shape, K4V3, machine)
    table, rows = step.page_table.long(), torch.arange(requests, device=machine.device)
    if decoding:
        writes = plan_decode_writes(rows * 0 + TILE_TOKENS, rows, table, PAGE_TOKENS)
    else:
        none = torch.zeros(1, dtype=torch.int64)
        writes = plan_writes(none, none + tokens, rows, table, PAGE_TOKENS, none)
    size, generator = (tokens, shape.kv_heads, shape.head_dim), machine.generator(4)
    key, value = (torch.randn(size, device=machine.device, generator=generator).bfloat16() for _ in range(2))
    frames = torch.randn(requests, shape.kv_heads, TILE_TOKENS, shape.head_dim, device=machine.device).half()
    shaping = key_basis(shape.kv_heads, shape.head_dim, seed=5).shaping.to(machine.device) if shaped else None
    if shaping is not None and not machine.rehearsed:
        shaping = shaping.mT.contiguous().mT  # as basis.Basis lays it out there

    def fresh() -> LayerStore:
        stored = replace(layer, pages=layer.pages.clone(), key_shaping=shaping)
        return replace(stored, frame_key_rot=frames.clone(), frame_value_rot=frames.clone())

    ours, twin = fresh(), fresh()
    call = machine.operations("triton").store_tokens
    call(key, value, writes, ours)
    TWIN.store_tokens(key, value, writes, twin)
    written = len(writes.page_ids) * shape.layout(K4V3).page_bytes / shape.layout(K4V3).tiles
    share = same_bytes("pages", ours.pages, twin.pages.cpu(), written)
    require("frames", float((ours.frame_key_rot != twin.frame_key_rot).sum()), 0)
    facts = {"tokens": tokens, "format": str(K4V3), "shaped": shaped, "share_of_bytes_that_differ": share}
    read = 2 * key.nbytes + (2 * frames.nbytes if writes.takes_frames else 0)
    return facts | machine.timed(lambda: call(key, value, writes, ours), read + written)


def extend(kernel: str, prompt: Prompt, machine: Machine) -> dict[str, Any]:
    shape = Shape(prompt.batch, prompt.prefix_tokens, **machine.size(HEADS, TINY_HEADS))
    tokens, generator = prompt.batch * prompt.new_tokens, machine.generator(5)
    heads = (shape.kv_heads * shape.gqa, shape.kv_heads, shape.kv_heads)
    new = [torch.randn(tokens, h, shape.head_dim, device=machine.device, generator=generator).bfloat16() for h in heads]
    token_bytes = 4 * shape.head_dim * shape.kv_heads
    # The twin holds a request's context twice in float32, and 64 queries' scores.
    longest = prompt.prefix_tokens + prompt.new_tokens
    machine.need_bytes(longest * (5 * token_bytes + 3 * 4 * 64 * heads[0]) + tokens * token_bytes, str(prompt))
    attend, want, stored_bytes = (_sdpa if kernel == SDPA else _ours)(kernel, prompt, shape, new, machine)
    error = require(kernel, relative_error(attend(), want), LARGEST_ERROR)
    facts = {"kernel": kernel, **asdict(prompt), "error": error}
    # The host plans an extend step: no CUDA graph holds it. The plan is made by now, once for all layers.
    return facts | machine.timed(attend, stored_bytes + tokens * token_bytes, captured=False)


def _ours(kernel: str, prompt: Prompt, shape: Shape, new: list[torch.Tensor], machine: Machine) -> Any:
    step, layer = packed_context(replace(shape, context_tokens=max(prompt.prefix_tokens, PAGE_TOKENS)), K4V3, machine)
    stored = [prompt.prefix_tokens] * prompt.batch
    step = replace(step, packed_tokens=torch.full_like(step.packed_tokens, prompt.prefix_tokens), stored_tokens=stored)
    counts = [prompt.new_tokens] * prompt.batch
    want, _ = reference.ExtendPlan(step, counts).run(*(side.float() for side in new), layer, shape.scoring)
    plan = machine.operations(BACKENDS[kernel]).plan_extend(step, counts)
    stored_bytes = bytes_per_token(layer.layout) * shape.kv_heads * prompt.batch * prompt.prefix_tokens
    return lambda: plan.run(*new, layer, shape.scoring)[0], want, stored_bytes


def _sdpa(_kernel: str, prompt: Prompt, shape: Shape, new: list[torch.Tensor], machine: Machine) -> Any:
    size = prompt.batch, shape.kv_heads, prompt.prefix_tokens, shape.head_dim
    query, *sides = (side.unflatten(0, (prompt.batch, -1)).transpose(1, 2) for side in new)  # [B, heads, T, D]
    generator = machine.generator(6)
    old = [torch.randn(size, device=machine.device, generator=generator, dtype=torch.bfloat16) for _ in sides]
    key, value = (torch.cat(pair, 2) for pair in zip(old, sides, strict=True))
    causal = causal_lower_right(prompt.new_tokens, key.shape[2])
    want = torch.stack(
        [attend_rows(q.transpose(0, 1), k.float(), v.float(), shape.scoring)[0] for q, k, v in
         zip(query, key, value, strict=True)]
    )  # fmt: skip

    def attend() -> torch.Tensor:
        out = scaled_dot_product_attention(query, key, value, causal, scale=shape.scoring.scale, enable_gqa=True)
        return out.transpose(1, 2)

    return attend, want, 4 * shape.head_dim * shape.kv_heads * prompt.batch * prompt.prefix_tokens
