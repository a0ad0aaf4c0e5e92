"""find_shared_prefix against a plain loop, over random trees."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltastore_kernels.shared_prefix import find_shared_prefix

PAGE_TOKENS = 32
NO_PAGE = 2**31 - 1


def naive(table: list[list[int]], packed_tokens: list[int]) -> tuple[list[int], list[int]]:
    owned = [row[: min(packed // PAGE_TOKENS, len(row))] for row, packed in zip(table, packed_tokens, strict=True)]
    leader = [
        next((j for j, other in enumerate(owned) if own and other[:1] == own[:1]), i) for i, own in enumerate(owned)
    ]
    pages = []
    for leads in leader:
        members = [own for own, other in zip(owned, leader, strict=True) if other == leads]
        run = 0
        while len(members) > 1 and all(run < len(own) and own[run] == members[0][run] for own in members):
            run += 1
        pages.append(run)
    return leader, pages


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    """Rows as a radix tree gives them, and now and then rows that none would give; behind them rubbish."""
    width = draw(st.integers(1, 5))
    rows = draw(st.lists(st.lists(st.integers(1, 3), min_size=0, max_size=width), min_size=1, max_size=7))
    rest = draw(st.sampled_from((0, 16)))
    filler = draw(st.sampled_from((0, 1, NO_PAGE)))
    return [row + [filler] * (width - len(row)) for row in rows], [len(row) * PAGE_TOKENS + rest for row in rows]


@settings(max_examples=300, deadline=None)
@given(batches())
def test_finds_what_a_plain_loop_finds(batch: tuple[list[list[int]], list[int]]) -> None:
    table, packed_tokens = batch
    found = find_shared_prefix(torch.tensor(table), torch.tensor(packed_tokens), PAGE_TOKENS)
    assert (found.leader.tolist(), found.pages.tolist()) == naive(table, packed_tokens)
    assert found.leader.dtype == found.pages.dtype == torch.int32


def test_nobody_shares_in_an_empty_batch_or_table() -> None:
    for shape in ((0, 3), (2, 0)):
        found = find_shared_prefix(torch.zeros(shape, dtype=torch.int32), torch.zeros(shape[0]), PAGE_TOKENS)
        assert found.leader.tolist() == list(range(shape[0]))
        assert not found.pages.any()


def test_nothing_waits_for_the_device() -> None:
    """On the meta device any look at a value raises."""
    found = find_shared_prefix(
        torch.zeros(4, 9, dtype=torch.int32, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta"), 64
    )
    assert found.leader.shape == found.pages.shape == (4,)
