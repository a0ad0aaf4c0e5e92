"""The operations on packed pages, one folder each.

`reference.py` in a folder is the operation's definition: plain torch, any device, slow where it
must be, and the twin that every faster backend is tested against. A backend is a module beside it
(`cpu.py`, `triton.py`, `cuda.py`) whose function has the folder's name and the same arguments. An
operation that a backend does not have is the reference's.

`load(backend)` returns the operations of one backend as a namespace.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

from .. import native

NAMES = ("rotate", "encode", "decode", "attend_decode", "attend_extend")
BACKENDS = ("reference", "cpu")


def load(backend: str = "auto", device: str = "cpu") -> SimpleNamespace:
    """The operations of `backend`, by name, for tensors on `device`.

    "auto" is the compiled CPU kernels where there are any and the tensors are on the CPU, else the
    reference. Raises ValueError for an unknown backend, native.LibraryUnavailable for "cpu" without
    the compiled library.
    """
    if backend == "auto":
        backend = "cpu" if device == "cpu" and native.available() else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"kernel backend {backend!r}: known are auto, {', '.join(BACKENDS)}")
    if backend == "cpu":
        native.library()
    return SimpleNamespace(**{name: _operation(name, backend) for name in NAMES})


def _operation(name: str, backend: str) -> object:
    module = f"{__name__}.{name}"
    if find_spec(f"{module}.{backend}") is None:
        backend = "reference"
    return getattr(import_module(f"{module}.{backend}"), name)
