"""The stand-in for sgl_kernel, for those who look into it."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator

import pytest

from sglang_deltastore.host.environment import STANDIN


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The stand-in, imported here for the length of a test."""
    held = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "sgl_kernel"}
    for name in held:
        del sys.modules[name]
    monkeypatch.syspath_prepend(STANDIN)
    yield importlib.import_module("sgl_kernel")
    for name in [name for name in sys.modules if name.split(".")[0] == "sgl_kernel"]:
        del sys.modules[name]
    sys.modules.update(held)
