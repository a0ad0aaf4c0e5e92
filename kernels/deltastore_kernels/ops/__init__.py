"""The operations on packed pages, one folder each.

`reference.py` in a folder is the operation's definition: plain torch, any device, slow where it
must be, and the twin that every faster backend is tested against. Beside it lie the modules that
backends are made of (`cpu.py`, `triton.py`, `cuda.py`), each with a function of the folder's name
and the same arguments. An operation is the first of its backend's modules that has it.

`load(backend)` returns the operations of one backend as a namespace.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import torch

from .. import native
from ..context import PagedContext

NAMES = ("rotate", "encode", "decode", "attend_decode", "attend_extend", "merge_state")
BACKENDS = {
    "reference": ("reference",),
    "cpu": ("cpu", "reference"),
    "triton": ("triton", "reference"),
    "flashinfer": ("cuda", "triton", "reference"),
}
"""Backend -> its modules, the first choice first."""
GPU_BACKENDS = ("triton", "flashinfer")
_SHARING_READS = ("triton",)
"""Backends whose attend_decode reads pages once for all requests that share them (context.SharedPrefix)."""


def load(backend: str = "auto", device: str = "cpu") -> SimpleNamespace:
    """The operations of `backend`, by name, for tensors on `device`; and

    shares_reads   whether its attend_decode makes use of context.SharedPrefix
    check_context  called with a step's context, raises ValueError where its indices leave the store. The compiled
                   kernels alone need it; on a GPU a look at indices would wait for it, so nothing is checked

    "auto" is Triton's on a GPU, the compiled kernels on a CPU where there are any, else the reference. Raises
    ValueError for an unknown backend, and for a GPU's on a CPU (but for Triton's interpreter);
    native.LibraryUnavailable for "cpu" without the compiled library.
    """
    on_cpu = torch.device(device).type == "cpu"
    if backend == "auto":
        backend = "triton" if not on_cpu else "cpu" if native.available() else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"kernel backend {backend!r}: known are auto, {', '.join(BACKENDS)}")
    if backend == "cpu":
        native.library()
    if on_cpu and backend in GPU_BACKENDS and not (backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(
            f"kernel backend {backend!r} on a CPU: it needs a GPU; use cpu or reference, or, to see Triton's kernels "
            "work on a CPU, slowly, triton with TRITON_INTERPRET=1 in the environment"
        )
    return SimpleNamespace(
        **{name: _operation(name, backend) for name in NAMES},
        shares_reads=backend in _SHARING_READS,
        check_context=native.check_context if backend == "cpu" else _check_nothing,
    )


def _check_nothing(_context: PagedContext) -> None:
    pass


def _operation(name: str, backend: str) -> object:
    modules = (f"{__name__}.{name}.{module}" for module in BACKENDS[backend])
    return getattr(import_module(next(filter(find_spec, modules))), name)
