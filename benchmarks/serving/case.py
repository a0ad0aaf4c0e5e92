"""One workload at one budget: what is asked, and the sides that are asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .sides import PAGE_TOKENS, Geometry, Side, check_holds, sides
from .tree_count import tree_of
from .workloads import Request


@dataclass(frozen=True)
class Case:
    """share, host_share: of the working set that the budget, and host memory behind it, would hold in 16 bits; running:
    requests at once, and frames."""

    requests: Sequence[Request]
    model: str
    tiers: Sequence[str]
    share: float
    running: int
    calibration: str = "none"
    host_share: float = 0

    @cached_property
    def working_set_tokens(self) -> int:
        return working_set_tokens(self.requests, self.running)

    @cached_property
    def budget_bytes(self) -> int:
        return int(self.share * self._working_set_bytes)

    @cached_property
    def host_bytes(self) -> int:
        return int(self.host_share * self._working_set_bytes)

    @cached_property
    def _working_set_bytes(self) -> int:
        """In 16 bits."""
        return self.working_set_tokens * Geometry.of(self.model).fp16_bytes_per_token

    @cached_property
    def sides(self) -> list[Side]:
        """Stock first. Raises ValueError where one could not run the longest request."""
        found = sides(
            Geometry.of(self.model), self.tiers, self.budget_bytes, self.running, self.calibration, self.host_bytes
        )
        check_holds(found, max(len(request.prompt) + request.answer_tokens for request in self.requests))
        return found

    def row(self, side: Side) -> dict[str, Any]:
        """What a side was given; no figures."""
        return {
            "side": side.name,
            "capacity_tokens": side.capacity_tokens,
            "calibration": Path(str(side.options.get("kv_compress_calibration", "none"))).name,
            "budget_share": self.share,
            "budget_bytes": self.budget_bytes,
            "host_bytes": self.host_bytes if "enable_hierarchical_cache" in side.options else 0,
            "working_set_tokens": self.working_set_tokens,
            "longest_prompt_tokens": max(len(request.prompt) for request in self.requests),
            "requests": len(self.requests),
            "sessions": len({request.session for request in self.requests}),
            "concurrency": self.running,
            "model": Path(self.model).name,
        }


def working_set_tokens(requests: Sequence[Request], running: int) -> int:
    """Tokens that a tree must hold to keep everything: all distinct whole pages of prompts and answers, and the pages
    that `running` requests take beside it. Answers are unknown and count as new text each."""
    contexts = (
        [*request.prompt, *(-1 - number for _ in range(request.answer_tokens - 1))]
        for number, request in enumerate(requests)
    )
    return (tree_of(contexts, PAGE_TOKENS).pages + 2 * running) * PAGE_TOKENS
