"""What the HTTP server answers: the facts as JSON, and the dashboard that shows them."""

from __future__ import annotations

from typing import Any

from ..dashboard import DASHBOARD_PATH, STATS_PATH, headers, page
from .facts import STATE_KEY
from .flags import settings_of


def add_routes(server_args: Any, tokenizer_manager: Any, *_args: Any, **_kwargs: Any) -> None:
    """BEFORE _setup_and_run_http_server."""
    if not settings_of(server_args).enabled:
        return

    from fastapi.responses import HTMLResponse
    from sglang.srt.entrypoints.http_server import app

    async def stats() -> list[dict[str, Any]]:
        """One snapshot for each scheduler."""
        snapshots = [state[STATE_KEY] for state in await tokenizer_manager.get_internal_state()]
        for snapshot in snapshots:
            for node in snapshot["nodes"]:
                if node["first_token_ids"]:
                    node["text"] = tokenizer_manager.tokenizer.decode(node["first_token_ids"])
        return snapshots

    async def dashboard() -> HTMLResponse:
        return HTMLResponse(page(), headers=headers())

    app.add_api_route(STATS_PATH, stats, methods=["GET"])
    app.add_api_route(DASHBOARD_PATH, dashboard, methods=["GET"], response_class=HTMLResponse)
