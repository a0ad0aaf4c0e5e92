"""Trees of drafts cut down to their longest branch."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_deltastore.seam.drafts import longest_chains


def tree(parents: list[int]) -> np.ndarray:
    """parents [N], -1 for the first -> mask [N, N]: whether draft i has draft j above it, or is it."""
    mask = np.eye(len(parents), dtype=bool)
    for draft, parent in enumerate(parents):
        if parent >= 0:
            mask[draft] |= mask[parent]
    return mask


@pytest.mark.parametrize(
    ("parents", "chain"),
    [
        ([-1, 0, 1, 2, 3], [10, 11, 12, 13, 14]),  # a chain already
        ([-1, 0, 1, 0, 0], [10, 11, 12, 0, 0]),  # two drafts, and SGLang's fill
        ([-1, 0, 0, 2, 3], [10, 12, 13, 14, 0]),  # a branch that goes nowhere, then a longer one
        ([-1, 0, 0, 0, 0], [10, 11, 0, 0, 0]),  # single guesses
    ],
)
def test_the_longest_branch_is_what_is_verified(parents: list[int], chain: list[int]) -> None:
    tokens, mask = np.arange(10, 15), tree(parents)
    other = np.arange(20, 25), tree([-1, 0, 1, 2, 3])
    both = np.concatenate([tokens, other[0]]), np.concatenate([mask.ravel(), other[1].ravel()])
    found, causal = longest_chains(*both, drafts=5)
    assert found.tolist() == [*chain, *range(20, 25)]
    assert causal.dtype == mask.dtype
    assert (causal.reshape(2, 5, 5) == np.tri(5, dtype=bool)).all()
