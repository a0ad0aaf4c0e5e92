"""One rule for where caches lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_deltastore.cache_folder import cache_folder
from sglang_deltastore.host import embedded, models
from sglang_deltastore.policy.calibration import cached_path


@pytest.mark.parametrize(
    ("value", "base"), [("/caches", "/caches"), ("relative/dir", "~/.cache"), ("", "~/.cache"), (None, "~/.cache")]
)
def test_a_relative_value_is_ignored_by_all_caches(
    monkeypatch: pytest.MonkeyPatch, value: str | None, base: str
) -> None:
    monkeypatch.setenv("HOME", "/somebody")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    own = Path(base).expanduser() / "deltastore"
    assert cache_folder() == own
    assert cached_path("abc") == own / "calibrations" / "abc.safetensors"
    assert models.cached_folder(embedded.MODELS["smollm2"]) == own / "models" / "smollm2-0.1.2-1"
