"""Where the user's caches lie: converted models and calibrations."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`deltastore` below $XDG_CACHE_HOME where that is an absolute path, else below ~/.cache.

    The XDG specification wants a relative value ignored: it would mean another folder in every directory.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "deltastore"
