"""Text of nodes, and who gets the page without a key."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.utils.auth import AuthDecision

from sglang_deltastore.seam import dashboard


class Tokenizer:
    """Of three words, as strict as some are."""

    words = ("tea", "for", "two")

    def __len__(self) -> int:
        return len(self.words)

    def decode(self, token_ids: list[int]) -> str:
        return " ".join(self.words[token_id] for token_id in token_ids)


@pytest.mark.parametrize(
    ("tokenizer", "token_ids", "text"),
    [
        (None, [0, 1], ""),
        (Tokenizer(), [], ""),
        (Tokenizer(), [0, 1, 2], "tea for two"),
        (Tokenizer(), [0, 151_655, 2, -7, 2**40], "tea two"),
    ],
)
def test_text(tokenizer: Any, token_ids: list[int], text: str) -> None:
    assert dashboard.text_of(tokenizer, token_ids) == text


@pytest.mark.parametrize(
    ("served", "method", "path", "allowed"),
    [
        (True, "GET", "/deltastore", True),
        (True, "POST", "/deltastore", False),
        (True, "GET", "/deltastore/stats", False),
        (True, "GET", "/deltastore/", False),
        (True, "GET", "//deltastore", False),
        (True, "GET", "/generate", False),
        (False, "GET", "/deltastore", False),
    ],
)
def test_the_page_alone_comes_without_a_key(
    monkeypatch: pytest.MonkeyPatch, served: bool, method: str, path: str, allowed: bool
) -> None:
    monkeypatch.setattr(dashboard, "_served", served)
    asked: list[SimpleNamespace] = []

    def sglangs_own(**request: Any) -> AuthDecision:
        asked.append(SimpleNamespace(**request))
        return AuthDecision(allowed=False)

    decision = dashboard.let_the_page_through(sglangs_own, method=method, path=path, api_key="k")
    assert decision.allowed == allowed
    assert [(one.method, one.path, one.api_key) for one in asked] == ([] if allowed else [(method, path, "k")])
