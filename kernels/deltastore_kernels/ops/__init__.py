"""The operations on packed pages, one folder each.

`reference.py` in a folder is the operation's definition: plain torch, any device, slow where it
must be, and the twin that every faster backend is tested against. Beside it lie the modules that
backends are made of (`cpu.py`, `triton.py`, `cuda.py`), each with a function of the folder's name
and the same arguments. The two attention operations have a plan there instead, made once a step
for all layers, whose `run` is one layer. An operation is the first of its backend's modules that
has it.

`load(backend)` returns the operations of one backend; `Operations` has their signatures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from .. import native
from ..context import LayerStore
from ..layout import GPU_HEAD_DIMS, HEAD_DIMS, PageLayout
from ..token_writes import TokenWrites
from ._flashinfer import FLOAT_WORKSPACE_BYTES, INT_WORKSPACE_BYTES, MOST_PLANS
from .attend_extend.cuda import WORKSPACE_BYTES
from .operations import DecodePlan, ExtendPlan, Operations

__all__ = [
    "BACKENDS",
    "GPU_BACKENDS",
    "OPERATIONS",
    "DecodePlan",
    "ExtendPlan",
    "Loaded",
    "Operations",
    "head_dims",
    "load",
    "scratch_bytes",
]

OPERATIONS = {
    **{name: (name, name) for name in ("rotate", "enter", "encode", "decode", "store_tokens")},
    "plan_decode": ("attend_decode", "DecodePlan"),
    "plan_extend": ("attend_extend", "ExtendPlan"),
}
"""Operation -> its folder, and its name in each module there."""
BACKENDS = {
    "reference": ("reference",),
    "cpu": ("cpu", "reference"),
    "triton": ("triton", "reference"),
    "flashinfer": ("cuda", "triton", "reference"),
}
"""Backend -> its modules, the first choice first."""
GPU_BACKENDS = ("triton", "flashinfer")
_SHARING_READS = ("triton",)
"""Backends whose attend_decode reads pages once for all requests that share them (StepContext.shared)."""

_CPU_THREAD_BYTES = 5 << 18
"""A thread's scratch and its three partial results, for the widest head: 1.1 MiB (csrc/cpu/attend.cpp)."""
_TRITON_PARTIALS_BYTES = 64 << 20
"""Partial results of decode's splits: some thousand programs of up to 16 rows of 512 floats."""


@dataclass(frozen=True)
class Loaded:
    """One backend's operations: the `Operations` that `load` gives."""

    rotate: Callable[[torch.Tensor], torch.Tensor]
    enter: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    encode: Callable[..., None]
    decode: Callable[[torch.Tensor, torch.Tensor, PageLayout], tuple[torch.Tensor, torch.Tensor]]
    store_tokens: Callable[[torch.Tensor, torch.Tensor, TokenWrites, LayerStore], None]
    plan_decode: Callable[..., DecodePlan]
    plan_extend: Callable[..., ExtendPlan]
    scratch_bytes: Callable[[Sequence[PageLayout], int], int]
    shares_reads: bool


def load(backend: str = "auto", device: str = "cpu") -> Operations:
    """The operations of `backend` for tensors on `device`.

    "auto" is Triton's on a GPU, the compiled kernels on a CPU where there are any, else the reference. Raises
    ValueError for an unknown backend, and for a GPU's on a CPU (but for Triton's interpreter);
    native.LibraryUnavailable for "cpu" without the compiled library.
    """
    on_cpu = torch.device(device).type == "cpu"
    backend = _named(backend, on_cpu)
    if backend == "cpu":
        native.library()
    if on_cpu and backend in GPU_BACKENDS and not (backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(
            f"kernel backend {backend!r} on a CPU: it needs a GPU; use cpu or reference, or, to see Triton's kernels "
            "work on a CPU, slowly, triton with TRITON_INTERPRET=1 in the environment"
        )
    return Loaded(
        **{operation: _find(operation, backend) for operation in OPERATIONS},
        shares_reads=backend in _SHARING_READS,
        scratch_bytes=_SCRATCH_BYTES[backend],
    )


def head_dims(backend: str, device: str) -> tuple[int, ...]:
    """The stored dims of a head that `backend`, as `load` takes it, has kernels for. Raises ValueError for an unknown
    backend."""
    return GPU_HEAD_DIMS if _named(backend, torch.device(device).type == "cpu") in GPU_BACKENDS else HEAD_DIMS


def _named(backend: str, on_cpu: bool) -> str:
    if backend == "auto":
        return "triton" if not on_cpu else "cpu" if native.available() else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"kernel backend {backend!r}: known are auto, {', '.join(BACKENDS)}")
    return backend


def scratch_bytes(backend: str, layouts: Sequence[PageLayout], context_tokens: int) -> int:
    """What a backend's kernels allocate beside their arguments and results, at most, over contexts of
    `context_tokens`: all of them, as layers run one after the other."""
    if backend == "reference":
        # One request's whole context of a layer as float32, once decoded and once joined with its new tokens.
        widest = max(layout.num_kv_heads * layout.head_dim for layout in layouts)
        return context_tokens * widest * 2 * 4 * 2
    if backend == "cpu":
        return torch.get_num_threads() * _CPU_THREAD_BYTES
    if backend == "triton":
        return _TRITON_PARTIALS_BYTES
    flashinfer_bytes = FLOAT_WORKSPACE_BYTES + MOST_PLANS * INT_WORKSPACE_BYTES
    return _TRITON_PARTIALS_BYTES + WORKSPACE_BYTES + flashinfer_bytes


_SCRATCH_BYTES = {backend: partial(scratch_bytes, backend) for backend in BACKENDS}


def _find(operation: str, backend: str) -> Any:
    folder, name = OPERATIONS[operation]
    modules = (f"{__name__}.{folder}.{module}" for module in BACKENDS[backend])
    return getattr(import_module(next(filter(find_spec, modules))), name)
