"""Where a token lies decides which range it counts to."""

from __future__ import annotations

import torch

from benchmarks.long_context import CHUNK_TOKENS, DISTANCES, POSITIONS, figures
from sglang_deltastore.lab.quality import Scores


def row(kl: torch.Tensor) -> dict[str, dict[str, float]]:
    """Of chunks from the second on."""
    beside = torch.ones(len(kl))
    return figures(Scores([kl], [beside], [beside], [beside]))


def test_ranges_of_positions_begin_behind_the_first_chunk() -> None:
    kl = torch.zeros(2 * CHUNK_TOKENS)
    kl[CHUNK_TOKENS:] = 1.0  # the third chunk: positions 1,024 to 1,535
    assert row(kl)["kl_by_position"] == {str(POSITIONS[0]): 0.0, str(POSITIONS[1]): 1.0}


def test_ranges_of_distances_begin_anew_with_each_chunk() -> None:
    kl = torch.zeros(2 * CHUNK_TOKENS)
    kl[[DISTANCES[0] - 1, CHUNK_TOKENS, CHUNK_TOKENS + 1]] = 1.0  # the last of the first range, the next chunk's first
    assert row(kl)["kl_by_distance"] == {str(end): 3 / 32 if end == DISTANCES[0] else 0.0 for end in DISTANCES}
