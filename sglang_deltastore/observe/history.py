"""The last minutes of a store, as columns."""

from __future__ import annotations

from collections import deque
from typing import Any

SAMPLE_SECONDS, SAMPLES = 5.0, 240
"""History of the last 20 minutes."""

SAMPLED = (
    "logical_tokens", "conversation_tokens", "stored_tokens", "used_bytes", "pages_running", "prompt_tokens",
    "hit_tokens", "canary_tokens", "canary_kl_nats",
)  # fmt: skip
"""Fields of StoreStats."""


class History:
    def __init__(self) -> None:
        self._samples: deque[tuple[float, ...]] = deque(maxlen=SAMPLES)

    def due(self, now_s: float) -> bool:
        """Whether the last sample is old enough for another. now_s: Unix time."""
        return not self._samples or now_s - self._samples[-1][0] >= SAMPLE_SECONDS

    def add(self, values: dict[str, Any]) -> None:
        """Fields of a snapshot; kept if a sample is due."""
        if self.due(values["taken_at_s"]):
            self._samples.append((values["taken_at_s"], *(values[name] for name in SAMPLED)))

    def columns(self) -> dict[str, list[float]]:
        names = ("time_s", *SAMPLED)
        return {name: [sample[at] for sample in self._samples] for at, name in enumerate(names)}
