"""What the machine is, and what it gives at best: the ceilings that the other figures are held against."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.gpu.machine import Machine, relative_error, require
from benchmarks.gpu.pieces import Piece

PACKAGES = ("torch", "triton", "numpy", "flashinfer-python", "apache-tvm-ffi", "sglang")
BF16_ERROR = 8e-3  # a product's rounding to bfloat16


def pieces(machine: Machine) -> list[Piece]:
    return [
        Piece("device", device),
        Piece("read", lambda machine: memory(machine, reads=1, writes=0)),
        Piece("copy", lambda machine: memory(machine, reads=1, writes=1)),
        Piece("matmul bf16", lambda machine: matmul(machine, torch.bfloat16)),
        Piece("matmul int8", lambda machine: matmul(machine, torch.int8)),
    ]


def device(machine: Machine) -> dict[str, Any]:
    facts: dict[str, Any] = {"python": platform.python_version(), "packages": {p: _version(p) for p in PACKAGES}}
    facts["nvcc"] = _said("nvcc", "--version")
    if machine.rehearsed:
        return facts
    found = torch.cuda.get_device_properties(0)
    facts["driver"] = _said("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader")
    return facts | {
        "capability": list(torch.cuda.get_device_capability(0)),
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "cuda": torch.version.cuda,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _said(program: str, *arguments: str) -> str | None:
    """The last line of what a program says, None where there is no such program."""
    if shutil.which(program) is None:
        return None
    said = subprocess.run([program, *arguments], capture_output=True, text=True, check=False).stdout
    return said.strip().splitlines()[-1] if said.strip() else ""


def memory(machine: Machine, reads: int, writes: int) -> dict[str, Any]:
    """Random numbers, far more than L2 holds: summed up, or copied."""
    count = machine.size(1 << 29, 1 << 12)
    numbers = torch.randint(-100, 100, (count,), dtype=torch.int32, device=machine.device)
    if writes:
        out = torch.empty_like(numbers)
        us = machine.us(lambda: out.copy_(numbers))
        require("copy", float((out != numbers).any()), 0)
    else:
        total = torch.empty((), dtype=torch.int64, device=machine.device)
        us = machine.us(lambda: torch.sum(numbers, 0, out=total))
        require("sum", abs(int(total) - int(numbers.cpu().sum())), 0)
    return {"bytes": (moved := numbers.nbytes * (reads + writes)), "us": us, "bytes_per_us": us and moved / us}


def matmul(machine: Machine, dtype: torch.dtype) -> dict[str, Any]:
    size = machine.size(8192, 32)
    left, right = (_random(size, dtype, machine, seed) for seed in (1, 2))
    product = torch._int_mm if dtype == torch.int8 else torch.mm
    out = product(left, right.T)
    some = slice(0, 64)
    error = relative_error(out[some], left[some].double() @ right.T.double())
    us = machine.us(lambda: product(left, right.T))
    return {
        "size": size,
        "error": require("a product", error, 0 if dtype == torch.int8 else BF16_ERROR),
        "us": us,
        "tera_operations_per_s": us and 2 * size**3 / us / 1e6,
    }


def _random(size: int, dtype: torch.dtype, machine: Machine, seed: int) -> torch.Tensor:
    numbers = torch.randn(size, size, device=machine.device, generator=machine.generator(seed))
    return (numbers * 30).clamp(-127, 127).to(dtype) if dtype == torch.int8 else numbers.to(dtype)
