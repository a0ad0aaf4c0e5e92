"""Which kernels a server runs on, and that they are there before the first request."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from deltastore_kernels import cuda_build, native, ops
from deltastore_kernels.layout import PageLayout
from deltastore_kernels.ops import Operations

logger = logging.getLogger(__name__)

OLDEST_CAPABILITY = (8, 0)
"""Compute capability from which the CUDA kernels run: int8 tensor cores of this shape."""


def choose_kernels(kernels: str, device: str, layouts: Iterable[PageLayout]) -> Operations:
    """The operations for `--kv-compress-kernels` on a device.

    auto on an NVIDIA GPU: the CUDA kernels where their modules load or build, else Triton's, and says why. Raises
    ValueError, cuda_build.CudaUnavailable or native.LibraryUnavailable when what was asked for cannot run.
    """
    if torch.device(device).type != "cuda" or kernels not in ("auto", "flashinfer"):
        return ops.load(kernels, device)
    try:
        _check_capability(device)
        for fmt, head_dim in sorted({(layout.format, layout.head_dim) for layout in layouts}, key=str):
            cuda_build.load(cuda_build.Kernels(fmt, head_dim))
    except cuda_build.CudaUnavailable as error:
        if kernels == "flashinfer":
            raise
        logger.warning("DeltaStore: Triton's kernels, not the CUDA ones: %s", error)
        return ops.load("triton", device)
    return ops.load("flashinfer", device)


def backend_of(kernels: Operations) -> str:
    """The module that decodes: cpu, triton, cuda, or reference."""
    module: str = kernels.plan_decode.__module__
    return module.rsplit(".", 1)[1]


def is_reference(kernels: Operations) -> bool:
    """Whether they are plain torch."""
    return backend_of(kernels) == "reference"


def describe(kernels: Operations) -> str:
    """In words, with the instruction set of compiled ones."""
    backend = backend_of(kernels)
    if backend == "cpu":
        return f"cpu ({native.isa()})"
    return "reference (plain torch)" if backend == "reference" else backend


def _check_capability(device: str) -> None:
    if torch.version.cuda is None:
        raise cuda_build.CudaUnavailable("this torch is not built for NVIDIA GPUs")
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        raise cuda_build.CudaUnavailable(f"compute capability {capability}; the CUDA kernels need {OLDEST_CAPABILITY}")
