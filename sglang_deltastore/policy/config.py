"""What the user asked for: one small frozen record, parsed once."""

from __future__ import annotations

from dataclasses import dataclass

from .tiers import DEFAULT_TIER, SERVED_TIERS, Tier, tier

MODES = ("none", "deltastore")
KERNELS = ("auto", "reference", "cpu", "triton", "flashinfer")
"""auto: the fastest that there are for the device; reference: plain torch, the others' twins."""
BACKEND_NAME = "deltastore"
"""Our name in SGLang's registries of attention backends and of radix caches."""

DEFAULT_PAGE_TOKENS = 16
"""Pages of one tile: the finest sharing between branches. Any multiple of 16 works."""

HOST_MEMORY_LAYOUT, HOST_IO_BACKEND = "layer_first", "direct"
"""Of SGLang's HiCache: a layer's pages are rows of one tensor on both sides, so that runs of neighbouring pages are
plain copies, which a GPU's copy engines take from pinned memory without a kernel."""

FRAME_BUDGET_SHARE = 1 / 64
"""Unless the user says how many requests may run at once, frames take at most this part of the KV budget,"""

MIN_FRAMES = 32
"""but there are at least this many."""


@dataclass(frozen=True)
class Settings:
    """The values of the `--kv-compress*` flags. Raises ValueError for an unknown mode, tier or kernels, and for
    a share that is none."""

    mode: str = "none"
    tier_name: str = DEFAULT_TIER
    calibration: str = "auto"
    calibration_text: str | None = None
    kernels: str = "auto"
    show_prompts: bool = False
    canary: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.canary <= 1:
            raise ValueError(
                f"--kv-compress-canary {self.canary}: allowed is the share of requests to measure, from 0 (none) to 1 "
                "(all); 0.01 is plenty for a server with traffic"
            )
        if self.kernels not in KERNELS:
            raise ValueError(f"--kv-compress-kernels {self.kernels}: known are {', '.join(KERNELS)}")
        if self.mode not in MODES:
            raise ValueError(f"--kv-compress {self.mode}: known are {', '.join(MODES)}")
        tier(self.tier_name, SERVED_TIERS)

    @property
    def enabled(self) -> bool:
        return self.mode == "deltastore"

    @property
    def tier(self) -> Tier:
        return tier(self.tier_name, SERVED_TIERS)
