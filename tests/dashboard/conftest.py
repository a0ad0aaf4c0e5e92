"""A real browser, and the page in it over facts that a test makes up."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from sglang_deltastore.observe.dashboard import DASHBOARD_PATH, STATS_PATH, headers, page
from tests.e2e.conftest import start_server

__all__ = ["start_server"]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The Chromium of this machine; nothing is downloaded."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("NO BROWSER: the dashboard was not looked at; apt-get install chromium")
    # Containers often run as root, which Chromium's sandbox refuses.
    options = {"executable_path": chromium, "args": ["--no-sandbox"]}
    with sync_playwright() as playwright, playwright.chromium.launch(**options) as browser:
        yield browser


class FactServer:
    """The dashboard, and stats as a test sets them. A number instead of facts is answered as an error status."""

    def __init__(self) -> None:
        self.facts: list[dict[str, Any]] | int = 500
        self.paths: list[str] = []
        self.delay_s = 0.0
        self.key: str | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.paths.append(self.path)
                if self.path == STATS_PATH:
                    time.sleep(outer.delay_s)
                body, extra = (page(), headers()) if self.path == DASHBOARD_PATH else (json.dumps(outer.facts), {})
                known = self.path in (DASHBOARD_PATH, STATS_PATH)
                broken = isinstance(outer.facts, int) and self.path == STATS_PATH
                opened = outer.key is None or self.headers["Authorization"] == f"Bearer {outer.key}"
                if self.path == STATS_PATH and not opened:
                    self.send_error(401)
                    return
                self.send_response(404 if not known else outer.facts if broken else 200)
                self.send_header("Content-Type", "text/html; charset=utf-8" if extra else "application/json")
                for name, value in extra.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}{DASHBOARD_PATH}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def fact_server() -> Iterator[FactServer]:
    server = FactServer()
    yield server
    server.close()
