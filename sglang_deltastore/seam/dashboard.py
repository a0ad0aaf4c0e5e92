"""What the HTTP server answers: the facts as JSON, and the dashboard that shows them."""

from __future__ import annotations

import os
from typing import Any

from ..dashboard import DASHBOARD_PATH, STATS_PATH, headers, page
from .facts import STATE_KEY
from .flags import settings_of
from .targets import HTTP_APP_VARIABLE, WORKER_APP


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
    from fastapi.responses import HTMLResponse
    from sglang.srt.entrypoints.http_server import get_global_state

    async def stats() -> list[dict[str, Any]]:
        """One snapshot for each scheduler."""
        manager = get_global_state().tokenizer_manager
        snapshots = [state[STATE_KEY] for state in await manager.get_internal_state()]
        for snapshot in snapshots:
            for node in snapshot["nodes"]:
                if node["first_token_ids"]:
                    node["text"] = manager.tokenizer.decode(node["first_token_ids"])
        return snapshots

    # FastAPI looks its annotations up in this module, for /openapi.json, and a local import is not there.
    async def dashboard() -> Any:
        return HTMLResponse(page(), headers=headers())

    app.add_api_route(STATS_PATH, stats, methods=["GET"])
    app.add_api_route(DASHBOARD_PATH, dashboard, methods=["GET"], response_class=HTMLResponse)
