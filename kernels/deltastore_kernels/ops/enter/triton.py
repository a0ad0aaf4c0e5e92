"""enter in Triton: queries, keys and values in one launch, from wherever the model has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .._triton import hadamard_rows, model_dim, use_asm

if TYPE_CHECKING:
    from ...basis import Basis


def enter(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, basis: Basis
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the twin; sums in float32."""
    tokens, heads, value_dim = value.shape
    group, key_dim = query.shape[1] // heads, key.shape[2]
    head_dim = basis.layout.head_dim if basis.layout else value_dim
    asm = use_asm(query)
    sides = [side if side.stride(-1) == 1 else side.contiguous() for side in (query, key, value)]
    query_rot, key_rot, value_rot = (side.new_empty(*side.shape[:2], head_dim) for side in sides)
    calibrated = basis.key_basis
    matrices = (query, key, key)  # not read
    if calibrated is not None:
        matrices = (calibrated.query_rotation, calibrated.rotation, basis.rotated_mean)
    if tokens:
        options = launch(head_dim, calibrated is not None, asm)
        enter_rows[(triton.cdiv(tokens * group, options["ROWS"]), 3 * heads)](
            *sides,
            *(stride for side in sides for stride in side.stride()[:2]),
            query_rot,
            key_rot,
            value_rot,
            *matrices,
            tokens,
            head_dim**-0.5,
            HEADS=heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            KEY_DIM=key_dim,
            VALUE_DIM=value_dim,
            **options,
        )
    return query_rot, key_rot, value_rot


def launch(head_dim: int, calibrated: bool, asm: bool) -> dict[str, int | bool | str]:
    """Rows and launch options of `enter_rows`. Three products of tensor cores keep what one would round away of a
    calibration's matrices; other vendors' have none such."""
    return {
        "ROWS": max(16, 4096 // head_dim),
        "ROUNDS": head_dim.bit_length() - 1,
        "CALIBRATED": calibrated,
        "PRECISION": "tf32x3" if asm else "ieee",
        "num_warps": 4 if head_dim < 256 else 8,
    }


@triton.jit
def enter_rows(
    query,  # [T, Hq, KEY_DIM]
    key,  # [T, H, KEY_DIM]
    value,  # [T, H, VALUE_DIM]
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    query_rot,  # [T, Hq, D]
    key_rot,  # [T, H, D]
    value_rot,
    query_rotation,  # [H, D, D] float32, as the next two read if CALIBRATED
    key_rotation,
    rotated_mean,  # [H, D] float32
    tokens,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    ROUNDS: tl.constexpr,
    CALIBRATED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """ROWS rows of one KV head: of its group's queries, of its keys, or of its values."""
    side, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if side == 0:
        token, query_head = row // GROUP, head * GROUP + row % GROUP
        x = query + token.to(tl.int64) * query_token_stride + query_head * query_head_stride
        x_rot = query_rot + (token.to(tl.int64) * (HEADS * GROUP) + query_head) * HEAD_DIM
        exists = token < tokens
        if CALIBRATED:
            matrix = query_rotation + head * (HEAD_DIM * HEAD_DIM)
            _store(x_rot, exists, _turned(x, exists, matrix, KEY_DIM, HEAD_DIM, PRECISION))
        else:
            _store(x_rot, exists, _rotated(x, exists, scale, KEY_DIM, HEAD_DIM, ROUNDS))
    elif tl.program_id(0) * ROWS < tokens:
        exists = row < tokens
        offset = (row.to(tl.int64) * HEADS + head) * HEAD_DIM
        if side == 2:
            x = value + row.to(tl.int64) * value_token_stride + head * value_head_stride
            _store(value_rot + offset, exists, _rotated(x, exists, scale, VALUE_DIM, HEAD_DIM, ROUNDS))
        else:
            x = key + row.to(tl.int64) * key_token_stride + head * key_head_stride
            if CALIBRATED:
                matrix = key_rotation + head * (HEAD_DIM * HEAD_DIM)
                mean = tl.load(rotated_mean + head * HEAD_DIM + tl.arange(0, HEAD_DIM))
                turned = _turned(x, exists, matrix, KEY_DIM, HEAD_DIM, PRECISION) - mean[None, :]
                _store(key_rot + offset, exists, turned)
            else:
                _store(key_rot + offset, exists, _rotated(x, exists, scale, KEY_DIM, HEAD_DIM, ROUNDS))


@triton.jit
def _load(x, exists, dims, DIM: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rows x [R] (pointers), stored dims [N] -> [R, N] float32, zeros where the model has no dim."""
    lies, there = model_dim(dims, DIM, HEAD_DIM)
    return tl.load(x[:, None] + lies[None, :], mask=exists[:, None] & there[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store(x_rot, exists, rotated):
    dims = tl.arange(0, rotated.shape[1])
    tl.store(x_rot[:, None] + dims[None, :], rotated.to(x_rot.dtype.element_ty), mask=exists[:, None])


@triton.jit
def _rotated(x, exists, scale, DIM: tl.constexpr, HEAD_DIM: tl.constexpr, ROUNDS: tl.constexpr):
    """Rows x [R] (pointers) times the Hadamard matrix."""
    return hadamard_rows(_load(x, exists, tl.arange(0, HEAD_DIM), DIM, HEAD_DIM), ROUNDS) * scale


@triton.jit
def _turned(x, exists, matrix, DIM: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr):
    """Rows x [R] (pointers) times matrix [D, D] (a pointer), as many dims at a time as shared memory holds."""
    BLOCK: tl.constexpr = min(32, 8192 // HEAD_DIM)
    turned = tl.zeros((x.shape[0], HEAD_DIM), tl.float32)
    columns = tl.arange(0, HEAD_DIM)
    for first in tl.range(0, HEAD_DIM, BLOCK):
        dims = first + tl.arange(0, BLOCK)
        block = tl.load(matrix + dims[:, None] * HEAD_DIM + columns[None, :])
        turned = tl.dot(_load(x, exists, dims, DIM, HEAD_DIM), block, turned, input_precision=PRECISION)
    return turned
