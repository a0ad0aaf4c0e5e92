"""The dashboard: one page, put together from its parts when it is served, that shows /deltastore/stats.

It asks nobody but the server it came from, and its Content-Security-Policy allows nothing else.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from html import escape
from pathlib import Path

from ..stats import table

DASHBOARD_PATH = "/deltastore"
STATS_PATH = "/deltastore/stats"

_PARTS = Path(__file__).parent


@cache
def page() -> str:
    """The whole page: style and script inside, nothing to load."""
    template = _part("page.html").replace("{{fields}}", _fields())
    return template.replace("{{style}}", _part("page.css")).replace("{{script}}", _part("page.js"))


@cache
def headers() -> dict[str, str]:
    """What the page is served with. Only its own script and style run; text that users wrote cannot add to them."""
    policy = (
        f"default-src 'none'; connect-src 'self'; script-src '{_hash('page.js')}'; style-src '{_hash('page.css')}'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {"Content-Security-Policy": policy, "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}


def _fields() -> str:
    """Rows of a table: what each field of a snapshot says."""
    return "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(fact.unit)}</td>'
        f'<td class="text">{escape(fact.help)}</td></tr>'
        for name, fact in table().items()
    )


def _part(name: str) -> str:
    return (_PARTS / name).read_text(encoding="utf-8")


def _hash(name: str) -> str:
    """As a policy names an inline script: the hash of what stands between its tags."""
    digest = hashlib.sha256(_part(name).encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
