"""What is said of two long answers."""

from __future__ import annotations

import pytest

from benchmarks.serving.greedy import Side, compared, repeated_share, until


def test_answers_end_with_their_end_token() -> None:
    assert until([5, 6, 2, 7, 2], {2}) == [5, 6, 2]
    assert until([5, 6], {2}) == [5, 6]


def test_where_answers_part_and_how_long_they_are() -> None:
    row = compared([[1, 2], [1, 2, 3, 4], [5]], [[1, 2], [1, 2, 9, 4], [6, 7, 8]], tokens=4)
    assert (row["same"], row["parted_at_tokens"], row["parted_at_tokens_median"]) == (1, [4, 2, 0], 2)
    assert (row["ended"], row["length_tokens_mean"]) == (2, 3)


@pytest.mark.parametrize(
    ("answer", "share"), [([1, 2, 3, 4, 5], 0.0), ([1, 2, 3, 4] * 3, 5 / 9), ([1] * 8, 0.8), ([1, 2], 0.0)]
)
def test_a_run_that_was_there_before_is_a_repetition(answer: list[int], share: float) -> None:
    assert repeated_share(answer) == pytest.approx(share)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("stock", {"--dtype": "float32", "--attention-backend": "torch_native"}),
        ("stock bfloat16", {"--dtype": "bfloat16", "--attention-backend": "torch_native"}),
        ("k4v2", {"--kv-compress-tier": "k4v2", "--kv-compress-calibration": "auto"}),
        ("k4v2 not calibrated", {"--kv-compress-tier": "k4v2", "--kv-compress-calibration": "none"}),
    ],
)
def test_servers(name: str, options: dict[str, str]) -> None:
    arguments = Side(name).arguments
    found = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert options.items() <= found.items()
