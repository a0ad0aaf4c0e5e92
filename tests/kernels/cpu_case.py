"""What the tests of the compiled CPU kernels share: every instruction set of this machine, fresh
memory full of NaN, and a float64 oracle fast enough for long contexts."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from deltastore_kernels import native, ops
from tests import budgets
from tests.kernels.attention_case import NO_PAGE, Case, gaussian, store, stored, sunk_tokens
from tests.kernels.paged_context import PagedContext

if not native.available():
    pytest.skip(f"compiled CPU kernels missing; {native.BUILD}", allow_module_level=True)

CPU = ops.load("cpu")
ISAS = native.isas()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest):
    before = native.isa()
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """torch.empty gives NaN, so that an output which is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@cache
def context_of(case: Case) -> PagedContext:
    """The case's context; pages wholly before a decode query's window are out of reach."""
    context = store(case, case.kv(seed=100), case.kv(seed=200))
    for i, length in enumerate(case.lengths):
        hidden = 0 if case.window_left is None else max(0, length - 1 - case.window_left)
        pages = min(hidden // case.page_tokens, -(-int(context.packed_tokens[i]) // case.page_tokens))
        context.spoil(context.page_table[i, :pages])
        context.page_table[i, :pages] = NO_PAGE
    return context


def query_of(case: Case) -> torch.Tensor:
    return gaussian(len(case.lengths), case.heads * case.group, case.head_dim, seed=99).to(case.dtype)


@cache
def decoded_of(case: Case) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Each request's keys and values [H, tokens, D] float64."""
    context = store(case, case.kv(seed=100), case.kv(seed=200))
    return tuple(stored(context, i) for i in range(len(case.lengths)))


def attend_float64(query: torch.Tensor, case: Case, packed_query: torch.Tensor | None = None):
    """attend_decode in float64: query [B, Hq, D] -> out [B, Hq, D], lse [B, Hq]. Packed tokens see
    `packed_query` if it is given, frames always `query`."""
    packed_query = query if packed_query is None else packed_query
    parts = [
        _attend_one(query[i : i + 1], packed_query[i : i + 1], *sides, case, sunk_tokens(context_of(case), i))
        for i, sides in enumerate(decoded_of(case))
    ]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def extend_float64(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    new_tokens: tuple[int, ...],
    case: Case,
    packed_query: torch.Tensor | None = None,
):
    """attend_extend in float64: query [T, Hq, D], key, value [T, H, D] -> out, lse, as above."""
    packed_query = query if packed_query is None else packed_query
    parts, begin = [], 0
    for i, (count, sides) in enumerate(zip(new_tokens, decoded_of(case), strict=True)):
        rows = slice(begin, begin + count)
        whole = [
            np.concatenate((old, new[rows].double().transpose(0, 1).numpy()), axis=1)
            for old, new in zip(sides, (key, value), strict=True)
        ]
        parts.append(
            _attend_one(
                query[rows], packed_query[rows], *whole, case, sunk_tokens(context_of(case), i), sides[0].shape[1]
            )
        )
        begin += count
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def _attend_one(
    query, packed_query, keys: np.ndarray, values: np.ndarray, case: Case, sunk: int, old: int | None = None
):
    """query, packed_query [R, Hq, D], the last R of the N positions; keys, values [H, N, D]. The first
    whole tiles of the `old` tokens are packed, but for the first `sunk` tokens."""
    keys, values = (side.repeat(case.group, axis=0) for side in (keys, values))
    total = keys.shape[1]
    packed = (total if old is None else old) // 16 * 16
    parts = ((query, slice(0, sunk)), (packed_query, slice(sunk, packed)), (query, slice(packed, total)))
    scores = np.concatenate(
        [np.einsum("rhd,hnd->rhn", rows.double().numpy(), keys[:, part]) for rows, part in parts], axis=2
    )
    scores *= case.scoring.scale
    if case.soft_cap:
        scores = case.soft_cap * np.tanh(scores / case.soft_cap)
    position = np.arange(total - len(query), total)[:, None, None]
    token = np.arange(total)
    hidden = token > position
    if case.window_left is not None:
        hidden |= token < position - case.window_left
    scores = np.where(hidden, -np.inf, scores)
    largest = scores.max(axis=2, keepdims=True)
    weights = np.exp(scores - largest)
    total_weight = weights.sum(axis=2, keepdims=True)
    out = np.einsum("rhn,hnd->rhd", weights / total_weight, values)
    return torch.tensor(out), torch.tensor((largest + np.log(total_weight))[:, :, 0])


def int8_query(query: torch.Tensor) -> torch.Tensor:
    """query [B, Hq, D] as the integer kernels see it: whole multiples of largest / 127."""
    query = query.float()
    largest = query.abs().amax(-1, keepdim=True)
    scaled = query * torch.full_like(largest, 127).div(largest)  # 127 / largest would multiply by 1 / largest
    return scaled.round().double() * (largest.double() / 127)


def float_budget(isa: str) -> float:
    """What attention may be off where nothing is rounded to 8 bits."""
    return budgets.BACKEND_ATTEND_SPLIT if isa == "amx" else budgets.BACKEND_ATTEND_FLOAT32


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    """RMS error over everything, relative."""
    return float(((got.double() - want).square().sum() / want.square().sum()).sqrt())


def request_rms(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Relative RMS error of each request's output."""
    error, size = (got.double() - want).square().sum((1, 2)), want.square().sum((1, 2))
    return (error / size).sqrt()
