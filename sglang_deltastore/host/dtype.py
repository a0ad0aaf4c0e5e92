"""Which `--dtype` a server takes on this machine's CPU."""

from __future__ import annotations

from pathlib import Path

from .environment import needs_cpu_engine

CPUINFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Instructions that multiply bfloat16, as Linux names them: x86's two, and ARM's."""
AUTO, FLOAT32 = "auto", "float32"


def cpu_flags() -> frozenset[str]:
    """The instruction sets of this CPU, as Linux names them; empty where nobody says."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return frozenset()
    named = (line.partition(":") for line in lines)
    return next((frozenset(v.split()) for k, _, v in named if k.strip() in ("flags", "Features")), frozenset())


def cpu_dtype(flags: frozenset[str]) -> str:
    """What SGLang's `--dtype` should be on a CPU with these `cpu_flags`: float32 where bfloat16, in which most models
    come, has no instructions: torch then takes each product apart, nine times as long on AVX2 (256 rows). A
    CPU that says nothing gets the model's own."""
    return FLOAT32 if flags and not flags & BFLOAT16_FLAGS else AUTO


def serving_dtype() -> str:
    """The same for a server on this machine; the model's own with a usable GPU."""
    return cpu_dtype(cpu_flags()) if needs_cpu_engine() else AUTO
