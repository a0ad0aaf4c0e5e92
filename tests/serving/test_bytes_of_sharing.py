"""C3's table: users share what they are said to share, and two counts must agree."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.serving import report
from benchmarks.serving.sharing import PUBLISHED, USERS, _counted, _temporal, users
from benchmarks.serving.sides import PAGE_TOKENS
from benchmarks.serving.tree_count import TokenTree, tree_of
from benchmarks.serving.workloads import Texts, WorkloadError
from tests.serving.data import write_workloads

CONTEXT_TOKENS, PAGE_BYTES, SINK_BYTES, FP16_PAGE_BYTES = 64, 1000, 10, 5000


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Texts:
    return Texts(write_workloads(tmp_path_factory.mktemp("workloads") / "data"), smollm2)


def stats(pages: int, **changes: object) -> SimpleNamespace:
    """Of a server whose every request holds four pages of its own and none shared."""
    figures = {
        "sinks_total": 4, "sinks_free": 2, "sinks_bytes": 5 * SINK_BYTES, "fp16_bytes_per_token": FP16_PAGE_BYTES / 16,
        "stored_tokens": pages * 16, "logical_tokens": pages * 16, "used_bytes": pages * PAGE_BYTES + 2 * SINK_BYTES,
        "fp16_shared_bytes": pages * FP16_PAGE_BYTES, "fp16_unshared_bytes": pages * FP16_PAGE_BYTES,
        "accounting_errors": (), "census_current": True,
    }  # fmt: skip
    return SimpleNamespace(**{**figures, **changes})


@pytest.mark.parametrize("share", PUBLISHED)
def test_users_share_that_part_of_their_context_and_no_page_more(texts: Texts, share: float) -> None:
    prompts = [request.prompt for request in users(texts, share, CONTEXT_TOKENS)]
    shared_pages = round(share * CONTEXT_TOKENS / PAGE_TOKENS)
    assert [len(prompt) for prompt in prompts] == [CONTEXT_TOKENS] * USERS
    assert all(prompt[: shared_pages * PAGE_TOKENS] == prompts[0][: shared_pages * PAGE_TOKENS] for prompt in prompts)
    assert {request.answer_tokens for request in users(texts, share, CONTEXT_TOKENS)} == {1}


def test_too_little_text_is_said(texts: Texts) -> None:
    with pytest.raises(WorkloadError, match="100 users of 4096 need"):
        users(texts, 0.12, 4096)


def two_alone() -> TokenTree:
    return tree_of([[1] * 64, [2] * 64], PAGE_TOKENS)


def test_figures_are_taken_where_both_counts_agree() -> None:
    figures = _counted(stats(8), two_alone(), PAGE_BYTES)
    assert figures["times_shared_fp16"] == 8 * FP16_PAGE_BYTES / (8 * PAGE_BYTES + 2 * SINK_BYTES)
    tree = tree_of([[1] * 32, [1] * 64, [2] * 64], PAGE_TOKENS)
    assert _temporal(stats(8), tree)["temporal"] == 10 / 8
    assert _temporal(stats(8), tree)["times_every_prompt_fp16"] == 10 * FP16_PAGE_BYTES / stats(8).used_bytes


@pytest.mark.parametrize(
    "change",
    [
        {"stored_tokens": 7 * 16},
        {"logical_tokens": 9 * 16},
        {"used_bytes": 8 * PAGE_BYTES},
        {"fp16_unshared_bytes": 9 * FP16_PAGE_BYTES},
        {"accounting_errors": ("one page is lost",)},
    ],
)
def test_counts_that_differ_are_an_error(change: dict[str, object]) -> None:
    with pytest.raises(RuntimeError, match="the server counts"):
        _counted(stats(8, **change), two_alone(), PAGE_BYTES)


def test_the_table_has_the_published_figure_beside_ours() -> None:
    row = {
        "benchmark": "sharing", "users": 100, "context_tokens": 512, "tier": "k4v2", "model": "m", "commit": "c",
        "prefix_share": 0.5, "published_times": 31.0, **_counted(stats(8), two_alone(), PAGE_BYTES),
    }  # fmt: skip
    assert "| 50% | 0.0 | 0.0 | 5.0 (31) | 0.0 | 4.99 |" in report.markdown([row])
