"""Observation never ends the server: what goes wrong in it is logged once, counted, and serving goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Guard:
    """Everything that only observes is called through `watch`."""

    def __init__(self) -> None:
        #: times that an observation failed, since the process started
        self.errors = 0
        self._logged: set[str] = set()

    def watch(self, place: str, observe: Callable[..., T], *args: Any) -> T | None:
        """What `observe(*args)` returns; None where it raises. `place` says in the log where that was."""
        try:
            return observe(*args)
        except Exception:
            self.failed(place)
            return None

    def failed(self, place: str) -> None:
        """Count the exception that is being handled; log it if it is the first of its place."""
        self.errors += 1
        if place not in self._logged:
            self._logged.add(place)
            logger.exception(
                "deltastore: observing failed (%s); serving goes on, figures may be missing. Further failures there "
                "are counted in observation_errors and not logged",
                place,
            )


#: of this process
GUARD = Guard()
