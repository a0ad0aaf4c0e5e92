"""Text of nodes, and who gets the page without a key."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sglang.srt.entrypoints import http_server
from sglang.srt.utils import auth
from sglang.srt.utils.auth import AuthDecision

from sglang_deltastore.seam import routes
from sglang_deltastore.seam.facts import STATE_KEY


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
    assert routes.text_of(tokenizer, token_ids) == text


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
    monkeypatch.setattr(routes, "_served", served)
    asked: list[SimpleNamespace] = []

    def sglangs_own(**request: Any) -> AuthDecision:
        asked.append(SimpleNamespace(**request))
        return AuthDecision(allowed=False)

    decision = routes.let_the_page_through(sglangs_own, method=method, path=path, api_key="k")
    assert decision.allowed == allowed
    assert [(one.method, one.path, one.api_key) for one in asked] == ([] if allowed else [(method, path, "k")])


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the schedulers answer; behind SGLang's own middleware, with our hook as its registry sets it."""
    states: list[dict[str, Any]] = [{STATE_KEY: {"replica": 0, "nodes": [{"first_token_ids": [0, 99], "text": ""}]}}]

    async def get_internal_state() -> list[dict[str, Any]]:
        return states

    manager = SimpleNamespace(get_internal_state=get_internal_state, tokenizer=Tokenizer())
    monkeypatch.setattr(http_server, "get_global_state", lambda: SimpleNamespace(tokenizer_manager=manager))
    monkeypatch.setattr(auth, "decide_request_auth", partial(routes.let_the_page_through, auth.decide_request_auth))
    return states


def client(api_key: str | None = None, admin_api_key: str | None = None) -> TestClient:
    app = FastAPI()
    routes.add_routes_to(app)
    auth.add_api_key_middleware(app, api_key=api_key, admin_api_key=admin_api_key)
    return TestClient(app)


@pytest.mark.parametrize(
    ("keys", "opens"),
    [
        ({}, {None, "users", "admins"}),
        ({"api_key": "users"}, {"users"}),
        ({"admin_api_key": "admins"}, {"admins"}),
        ({"api_key": "users", "admin_api_key": "admins"}, {"admins"}),
    ],
)
def test_facts_want_the_key_and_the_page_does_not(
    states: list[dict[str, Any]], keys: dict[str, str], opens: set[str | None]
) -> None:
    asked = client(**keys)
    for key in (None, "users", "admins"):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        answer = asked.get("/deltastore/stats", headers=headers)
        assert answer.status_code == (200 if key in opens else 401), key
        if key in opens:
            assert answer.json() == [{"replica": 0, "nodes": [{"first_token_ids": [0, 99], "text": "tea"}]}]
        page = asked.get("/deltastore", headers=headers)
        assert (page.status_code, "script-src" in page.headers["Content-Security-Policy"]) == (200, True)


def test_replicas_stand_in_their_order_whichever_answers_first(states: list[dict[str, Any]]) -> None:
    states[:0] = [{STATE_KEY: {"replica": replica, "nodes": []}} for replica in (2, 1)]
    assert [snapshot["replica"] for snapshot in client().get("/deltastore/stats").json()] == [0, 1, 2]


def test_a_scheduler_that_could_not_look(states: list[dict[str, Any]]) -> None:
    states.append({})
    answer = client().get("/deltastore/stats")
    assert (answer.status_code, "log says why" in answer.text) == (503, True)
