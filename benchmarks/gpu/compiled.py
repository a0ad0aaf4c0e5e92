"""Kernels compiled without a GPU, and what the compiler gave them: registers, memory, machine code."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from deltastore_kernels.cuda_build import Kernels, cuda_home, include_folders, source_hash

#: as FlashInfer's JIT compiles them (flashinfer/jit/core.py: gen_jit_spec)
NVCC_FLAGS = ("-std=c++17", "-O3", "-use_fast_math", "-DNDEBUG")
WARP_LANES = 32


@dataclass(frozen=True)
class Architecture:
    """Of one multiprocessor: the limits that decide how many thread blocks it holds (CUDA C++ Programming Guide,
    "Technical Specifications per Compute Capability")."""

    name: str
    compiled_as: str
    shared_bytes: int
    warps: int
    registers: int = 65536
    blocks: int = 32
    reported_system_bytes: int = 0  # of the system's share, in what cuobjdump calls a kernel's shared memory

    def occupancy_blocks(self, registers: int, shared_bytes: int, warps: int) -> int:
        """Thread blocks that fit. Registers are given out 256 a warp, and 1 KiB of shared memory is the system's."""
        warp_registers = -(-registers * WARP_LANES // 256) * 256
        by_registers = self.registers // (warp_registers * warps)
        by_shared = self.shared_bytes // (-(-shared_bytes // 128) * 128 + 1024)
        return min(by_registers, by_shared, self.warps // warps, self.blocks)


ARCHITECTURES = {
    "sm_80": Architecture("sm_80", "sm_80", 164 << 10, 64),
    "sm_90": Architecture("sm_90", "sm_90a", 228 << 10, 64, reported_system_bytes=1024),
}


@dataclass(frozen=True)
class Compiled:
    """One kernel. `local_instructions`: on local memory, for spilled registers or arrays with a changing index."""

    registers: int
    shared_bytes: int
    stack_bytes: int
    local_instructions: int
    sass: str


def compile_cuda(kernels: Kernels, architecture: Architecture) -> Path:
    """A cubin of csrc/cuda/kernels.cuh; kept between runs. Takes some five seconds."""
    flags = [*NVCC_FLAGS, *kernels.defines, f"-arch={architecture.compiled_as}"]
    content = hashlib.sha256(repr((flags, source_hash(), str(cuda_home()))).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / "deltastore-cubins"
    folder.mkdir(exist_ok=True)
    cubin = folder / f"{kernels.name}-{architecture.name}-{content}.cubin"
    if not cubin.exists():
        partial = cubin.with_suffix(".partial")
        includes = [f"-I{path}" for path in include_folders()]
        source = cubin.with_suffix(".cu")
        source.write_text('#include "kernels.cuh"\n')
        command = [cuda_home() / "bin" / "nvcc", *flags, *includes, "-cubin", source, "-o", partial]
        subprocess.run(command, check=True)
        partial.rename(cubin)
    return cubin


def kernels_of(cubin: Path, architecture: Architecture) -> dict[str, Compiled]:
    """The kernels of a cubin, by name."""
    usage = _run("cuobjdump", "-res-usage", cubin)
    sections = re.split(r"^//-+ \.text\.(\S+)\s+-+$", _run("nvdisasm", "-c", cubin), flags=re.MULTILINE)
    sass = dict(zip(sections[1::2], sections[2::2], strict=True))
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    return {
        name: Compiled(
            registers=int(registers),
            shared_bytes=int(shared) - architecture.reported_system_bytes,
            stack_bytes=int(stack) + int(local),
            local_instructions=len(re.findall(r"\b(?:LDL|STL)\b", sass[name])),
            sass=sass[name],
        )
        for name, registers, stack, shared, local in found
    }


def _run(tool: str, *arguments: object) -> str:
    return subprocess.run([_tool(tool), *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def _tool(name: str) -> str:
    """A binary utility of the CUDA toolkit; Triton brings them along. Raises FileNotFoundError."""
    if triton := find_spec("triton"):
        bundled = Path(triton.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / name
        if bundled.exists():
            return str(bundled)
    if on_path := shutil.which(name):
        return on_path
    raise FileNotFoundError(f"{name}: neither in the package triton nor on PATH; install one of triton, CUDA toolkit")
