"""Facts about a running store as plain Python types, ready for JSON. Imports nothing of ours."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class StoreStats:
    """One snapshot.

    format          of all layers, or their mean bits where a calibration deals them out
    ratio           fp16 bytes of a token over the bytes of its pages: codes, scales, padding
    resident_ratio  the same over every byte that is allocated: padding page, frames and sinks as well
    sinks_missed    sequences that found no free sink, and are read from packed pages alone
    scratch_bytes   kept free within the KV budget for attention's temporaries; not allocated
    """

    tier: str
    format: str
    calibrated: bool
    page_tokens: int
    capacity_tokens: int
    bytes_per_token: float
    fp16_bytes_per_token: float
    ratio: float
    resident_ratio: float
    pages_bytes: int
    frames_bytes: int
    sinks_bytes: int
    scratch_bytes: int
    pages_total: int
    pages_free: int
    pages_in_nodes: int
    pages_running: int
    shared_tokens: int
    frames_total: int
    frames_free: int
    frames_running: int
    sinks_total: int
    sinks_free: int
    sinks_missed: int
    encoded_tokens: int
    accounting_errors: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "accounting_errors": list(self.accounting_errors)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StoreStats:
        return cls(**{**values, "accounting_errors": tuple(values["accounting_errors"])})
