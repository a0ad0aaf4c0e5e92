"""What gpu-day is made of: pieces, each of which gives one row of what it found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.machine import Machine


@dataclass(frozen=True)
class Piece:
    """`run` gives the row's facts. It raises machine.Absent where something that it needs is not there, anything else
    where something is wrong: then there is no figure."""

    name: str
    run: Callable[[Machine], dict[str, Any]]
