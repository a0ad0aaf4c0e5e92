"""What the HTTP server answers: the facts as JSON, and the dashboard that shows them."""

from __future__ import annotations

import os
from operator import itemgetter
from typing import Any

from ..observe.dashboard import DASHBOARD_PATH, STATS_PATH, headers, page
from ..observe.guard import GUARD
from .facts import STATE_KEY
from .flags import settings_of
from .targets import HTTP_APP_VARIABLE, WORKER_APP

_served = False
"""Whether this process answers for the page."""


def add_routes(server_args: Any, *_args: Any, **_kwargs: Any) -> None:
    """BEFORE _setup_and_run_http_server."""
    if not settings_of(server_args).enabled:
        return

    from sglang.srt.entrypoints.http_server import app

    add_routes_to(app)
    # With --tokenizer-worker-num above 1 other processes answer, which import this.
    os.environ.setdefault(HTTP_APP_VARIABLE, WORKER_APP)


def add_routes_to(app: Any) -> None:
    """app: SGLang's FastAPI application, in whatever process answers requests."""
    from fastapi import HTTPException
    from fastapi.responses import HTMLResponse
    from sglang.srt.entrypoints.http_server import get_global_state
    from sglang.srt.utils.auth import AuthLevel, auth_level

    # The facts are about everybody's requests: where SGLang has an --admin-api-key they want that one, else the
    # --api-key, as its own routes for administrators do.
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def stats() -> list[dict[str, Any]]:
        """One snapshot for each replica."""
        manager = get_global_state().tokenizer_manager
        states = await manager.get_internal_state()
        if not all(STATE_KEY in state for state in states):
            raise HTTPException(503, "DeltaStore could not look at its store; the server's log says why")
        # They come as the replicas have answered.
        snapshots = sorted((state[STATE_KEY] for state in states), key=itemgetter("replica"))
        for snapshot in snapshots:
            for node in snapshot["nodes"]:
                node["text"] = GUARD.watch("text of nodes", text_of, manager.tokenizer, node["first_token_ids"]) or ""
        return snapshots

    # FastAPI looks its annotations up in this module, for /openapi.json, and a local import is not there.
    async def dashboard() -> Any:
        return HTMLResponse(page(), headers=headers())

    global _served  # noqa: PLW0603 (the hook below has no other way to know)
    _served = True
    app.add_api_route(STATS_PATH, stats, methods=["GET"])
    app.add_api_route(DASHBOARD_PATH, dashboard, methods=["GET"], response_class=HTMLResponse)


def text_of(tokenizer: Any, token_ids: list[int]) -> str:
    """Without a tokenizer (--skip-tokenizer-init) there is no text; ids that are none of its words (of images, for
    one) are left out."""
    if tokenizer is None or not token_ids:
        return ""
    words = len(tokenizer)
    return tokenizer.decode([token_id for token_id in token_ids if 0 <= token_id < words])


def let_the_page_through(original: Any, *, method: str, path: str, **request: Any) -> Any:
    """AROUND auth.decide_request_auth: the page itself, which says nothing of the server, comes without a key, and
    asks for one. A browser sends none by itself."""
    from sglang.srt.utils.auth import AuthDecision

    if _served and method == "GET" and path == DASHBOARD_PATH:
        return AuthDecision(allowed=True)
    return original(method=method, path=path, **request)
