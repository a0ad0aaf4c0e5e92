"""A server that answers like SGLang's native endpoint, at once and with made-up tokens."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeServer(ThreadingHTTPServer):
    """`prompts`: what was asked, in the order of arrival; `most_at_once`: answers under way at a time."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.prompts: list[list[int]] = []
        self.lost_tokens = 0  # of each answer
        self.step_s = 0.0
        self.computed = 0
        self.running = self.most_at_once = 0
        self.refuses = False
        self.lock = threading.Lock()

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are part of the test."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.startswith("/generate"):
            self._generate(json.loads(asked))
        else:
            self._answer(b"done")

    def do_GET(self) -> None:
        counters = {
            'sglang:realtime_tokens_total{mode="prefill_compute"}': self.server.computed,
            'sglang:realtime_tokens_total{mode="decode"}': 7,
            'sglang:evicted_tokens_total{component="a"}': 5,
            'sglang:evicted_tokens_total{component="b"}': 6,
        }
        self._answer("".join(f"{name} {value}\n" for name, value in counters.items()).encode())

    def _generate(self, asked: dict[str, Any]) -> None:
        server, prompt = self.server, asked["input_ids"]
        if server.refuses:
            self.send_error(503)
            return
        with server.lock:
            server.prompts.append(prompt)
            server.running += 1
            server.most_at_once = max(server.most_at_once, server.running)
            server.computed += len(prompt)
        try:
            self._stream(asked, prompt)
        finally:
            with server.lock:
                server.running -= 1

    def _stream(self, asked: dict[str, Any], prompt: list[int]) -> None:
        tokens = asked["sampling_params"]["max_new_tokens"]
        meta = {"prompt_tokens": len(prompt), "cached_tokens": 0, "finish_reason": {"type": "length"}}
        meta["input_token_logprobs"] = [[None, 0, None], *([-1.0, 0, None] for _ in prompt[len(prompt) // 2 + 1 :])]
        if not asked["stream"]:
            self._answer(
                json.dumps({"output_ids": [1] * tokens, "meta_info": {**meta, "completion_tokens": 1}}).encode()
            )
            return
        self.send_response(200)
        self.end_headers()
        for count in range(1, tokens + 1):
            time.sleep(self.server.step_s)
            if count > tokens - self.server.lost_tokens:
                break
            event = {"output_ids": [1] * count, "meta_info": {**meta, "completion_tokens": count}}
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    server = FakeServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
