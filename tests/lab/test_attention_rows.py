"""The lab's attention, cut into rows of queries and the keys that these see, against one softmax over everything."""

from __future__ import annotations

import pytest
import torch

from sglang_deltastore.lab import attention

STORED, NEW, HEADS, GROUP, DIM = 37, 90, 2, 3, 16


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 1, 20, 500])
@pytest.mark.parametrize("rows", [16, 45, 90])
def test_rows_see_what_the_mask_shows(
    rows: int, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "QUERY_ROWS", rows)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, HEADS * GROUP, NEW, DIM, generator=generator)
    key, value = (torch.randn(1, HEADS, STORED + NEW, DIM, generator=generator) for _ in range(2))
    at, keys_at = torch.arange(STORED, STORED + NEW)[:, None], torch.arange(STORED + NEW)
    seen = (keys_at <= at) & (keys_at > at - (window or STORED + NEW))
    mask = torch.zeros(1, 1, *seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    scores = query.double() @ key.double().repeat_interleave(GROUP, 1).mT * 0.3
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = (weights @ value.double().repeat_interleave(GROUP, 1)).transpose(1, 2)
    found, _ = attention.attend(
        torch.nn.Module(), query, key, value, mask, scaling=0.3, softcap=softcap, sliding_window=window
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
