"""The operations on packed pages, one folder each.

`reference.py` in a folder is the operation's definition: plain torch, any device, slow where it
must be, and the twin that every faster backend is tested against. A backend is a module beside it
(`cpu.py`, `triton.py`, `cuda.py`) whose function has the folder's name and the same arguments.

`load(backend)` returns the operations of one backend as a namespace.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

NAMES = ("rotate", "encode", "decode", "attend_decode", "attend_extend")
BACKENDS = ("reference",)


def load(backend: str = "reference") -> SimpleNamespace:
    """The operations of `backend`, by name. Raises ValueError for an unknown backend."""
    if backend not in BACKENDS:
        raise ValueError(f"kernel backend {backend!r}: known are {', '.join(BACKENDS)}")
    return SimpleNamespace(
        **{name: getattr(import_module(f"{__name__}.{name}.{backend}"), name) for name in NAMES}
    )
