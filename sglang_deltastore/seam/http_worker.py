"""SGLang's HTTP app for the processes of --tokenizer-worker-num, which import it by name and load no plugins."""

from __future__ import annotations

from sglang.srt.entrypoints.http_server import app
from sglang.srt.plugins import load_plugins

from .proof import NotInForce
from .routes import add_routes_to
from .targets import REQUEST_HOOKS, missing_hooks

load_plugins()
if missing := missing_hooks(REQUEST_HOOKS):
    raise NotInForce(f"deltastore asked for, but these hooks did not apply in an HTTP worker: {missing}")
add_routes_to(app)
