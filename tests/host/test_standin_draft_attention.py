"""What the stand-in for sgl_kernel attends to for a draft model, against softmax written out."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable

import pytest
import torch

HEADS, GROUP, DIM, SLOTS = 2, 3, 8, 40
SCALE = 0.3
ROWS, TOTAL, NEW = torch.tensor([2, 0]), torch.tensor([7, 12]), torch.tensor([3, 1])
"""Two requests: their rows, their tokens, and how many of these are new."""


@pytest.fixture
def attention(standin: types.ModuleType) -> types.ModuleType:
    return importlib.import_module("sgl_kernel.draft_attention")


class Case:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.key, self.value = (torch.randn(SLOTS, HEADS, DIM, generator=generator) for _ in range(2))
        self.query = torch.randn(int(NEW.sum()), HEADS * GROUP, DIM, generator=generator)
        self.table = torch.stack([torch.randperm(SLOTS, generator=generator)[:16] for _ in range(3)]).int()

    def expected(self, window: int) -> torch.Tensor:
        out, row = torch.empty_like(self.query), 0
        for request, total, new in zip(ROWS, TOTAL, NEW, strict=True):
            for position in range(int(total - new), int(total)):
                first = max(0, position + 1 - window) if window else 0
                slots = self.table[request, first : position + 1].long()
                for head in range(HEADS * GROUP):
                    weights = (self.key[slots, head // GROUP] @ self.query[row, head] * SCALE).softmax(0)
                    out[row, head] = weights @ self.value[slots, head // GROUP]
                row += 1
        return out


def extend(attention: types.ModuleType, case: Case, window: int) -> torch.Tensor:
    out, start = torch.empty_like(case.query), NEW.cumsum(0) - NEW
    attention.extend_attention_cpu(
        case.query, None, None, out, case.key, case.value, 1.0, 1.0, case.table, ROWS, TOTAL, NEW, start, 3, SCALE,
        0.0, False, window, None, None, None, True,
    )  # fmt: skip
    return out


def decode(attention: types.ModuleType, case: Case, window: int) -> torch.Tensor:
    """Each request's new tokens one after the other, which are not stored before."""
    outs, start = [], (NEW.cumsum(0) - NEW).tolist()
    for request, (first, new) in enumerate(zip(start, NEW.tolist(), strict=True)):
        for index in range(new):
            row, total = ROWS[request : request + 1], TOTAL[request : request + 1] - new + index + 1
            slot = case.table[row, total - 1].long()
            key, value = case.key[slot].clone(), case.value[slot].clone()
            case.key[slot] = case.value[slot] = float("nan")
            query = case.query[first + index : first + index + 1]
            outs.append(torch.empty_like(query))
            attention.decode_attention_cpu(
                query, case.key, case.value, 1.0, 1.0, outs[-1], key, value, slot, torch.empty(0), case.table, row,
                total, SCALE, 0.0, False, window, None, None,
            )  # fmt: skip
    return torch.cat(outs)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("attend", [extend, decode])
def test_each_token_sees_those_before_it(
    attention: types.ModuleType, attend: Callable[..., torch.Tensor], window: int
) -> None:
    expected = Case().expected(window)
    torch.testing.assert_close(attend(attention, Case(), window), expected)


def test_what_it_does_not_know_is_said(attention: types.ModuleType) -> None:
    case = Case()
    whole = [
        case.query, None, None, case.query, case.key, case.value, 1.0, 1.0, case.table, ROWS, TOTAL, NEW, NEW, 3, SCALE,
        0.0, False, 0, None, None, None, True,
    ]  # fmt: skip
    for place, value in ((15, 30.0), (19, torch.zeros(6)), (20, torch.ones(9, dtype=torch.bool)), (21, False)):
        with pytest.raises(NotImplementedError, match="draft with another model"):
            attention.extend_attention_cpu(*[value if i == place else given for i, given in enumerate(whole)])


def test_a_chain_reads_its_requests_row(attention: types.ModuleType) -> None:
    table = Case().table
    assert torch.equal(attention.build_draft_decode_metadata_cpu(table, ROWS, TOTAL, 1, 4, 16), table[ROWS])
    with pytest.raises(NotImplementedError, match="2 drafts for the same place"):
        attention.build_draft_decode_metadata_cpu(table, ROWS, TOTAL, 2, 4, 16)
