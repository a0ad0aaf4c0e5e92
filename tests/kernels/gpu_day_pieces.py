"""Pieces of a stage as bad as they come, for test_gpu_day.py."""

from __future__ import annotations

import os
import time

from benchmarks.gpu.machine import Absent, require
from benchmarks.gpu.pieces import Piece


def raises(error: Exception):
    def run(_machine) -> None:
        raise error

    return run


def pieces(_machine) -> list[Piece]:
    return [
        Piece("good", lambda _: {"us": 10.0}),
        Piece("raises", raises(ValueError("of this test"))),
        Piece("dies", lambda _: os._exit(9)),
        Piece("absent", raises(Absent("not here"))),
        Piece("wrong", lambda _: {"error": require("a kernel", float("nan"), 1.0), "us": 10.0}),
        Piece("hangs", lambda _: time.sleep(1000)),
        Piece("last", lambda _: {"us": 20.0}),
    ]


def breaks_before_its_first(_machine) -> list[Piece]:
    raise RuntimeError("no list")
