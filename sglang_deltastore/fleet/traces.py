"""Traces of requests, read one line at a time; compressed ones (.zst, .gz) are streamed. See `formats`."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from .formats import FORMATS, Request, TraceError, own_block_tokens
from .prefix_tree import block_sequence, partial_block

_ERRORS_KEPT = 5


@dataclass
class Trace:
    """Iterate to read; every iteration starts anew and streams. `skipped` and `errors` are of the last one.

    on_error: "stop" raises TraceError at the first bad line, "skip" leaves it out and counts it.
    """

    path: Path
    page_tokens: int = 16
    format: str = "auto"
    on_error: str = "stop"
    sessions_at_once: int = 16
    skipped: int = 0
    errors: list[str] = field(default_factory=list)
    line_number: int = 0
    bytes_read: int = 0

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        if self.on_error not in ("stop", "skip"):
            raise ValueError(f"on_error={self.on_error!r}: allowed are stop, skip")
        if self.page_tokens <= 0 or self.sessions_at_once <= 0:
            raise ValueError(
                f"page_tokens={self.page_tokens}, sessions_at_once={self.sessions_at_once}: both must be at least 1"
            )
        if self.format == "auto":
            self.format = self._detect()
        if self.format not in FORMATS:
            raise ValueError(f"trace format {self.format!r}: known are auto, {', '.join(FORMATS)}")
        self.block_tokens = FORMATS[self.format].block_tokens or own_block_tokens(self._first_line())
        if self.block_tokens % self.page_tokens:
            raise ValueError(
                f"page size {self.page_tokens}: a block of this trace has {self.block_tokens} tokens and must hold "
                "whole pages; choose a page size that divides it"
            )

    @property
    def pages_per_block(self) -> int:
        return self.block_tokens // self.page_tokens

    def __iter__(self) -> Iterator[Request]:
        self.skipped, self.errors, self.line_number, self.bytes_read = 0, [], 0, 0
        with open(self.path, "rb") as file:
            yield from FORMATS[self.format].parse(self, self._lines(file))

    def sequence(self, ids: Any, whole_pages: int) -> bytes:
        """Ids of blocks -> sequence of exactly `whole_pages` pages, the last block cut where it is not full."""
        blocks, tail_pages = divmod(whole_pages, self.pages_per_block)
        tail = partial_block(ids[blocks], tail_pages, self.pages_per_block) if tail_pages else b""
        return block_sequence(ids[:blocks]) + tail

    def attempt(self, parse: Callable[[], Any]) -> Any:
        """parse(), or None for a bad line that is to be skipped."""
        try:
            return parse()
        except (TraceError, ValueError, KeyError, TypeError, OverflowError) as error:
            message = f"{self.path.name}, line {self.line_number}: {error}"
            if self.on_error == "stop":
                raise TraceError(f"{message}. Mend the line, or leave such lines out with --on-error skip") from None
            self.skipped += 1
            if len(self.errors) < _ERRORS_KEPT:
                self.errors.append(message)
            return None

    def _lines(self, file: BinaryIO) -> Iterator[bytes]:
        """Lines without their end; blank ones are passed over. Keeps count of lines and of bytes taken from disk."""
        stream: Any = file
        if self.path.suffix == ".zst":
            stream = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file))
        elif self.path.suffix == ".gz":
            stream = gzip.GzipFile(fileobj=file)
        try:
            for line in stream:
                self.line_number += 1
                self.bytes_read = file.tell()
                if stripped := line.strip():
                    yield stripped
        except (zstandard.ZstdError, EOFError, OSError) as error:
            raise TraceError(f"{self.path.name}, after line {self.line_number}: cannot decompress: {error}") from error

    def _first_line(self) -> bytes:
        with open(self.path, "rb") as file:
            line = next(self._lines(file), b"")
        self.line_number = self.bytes_read = 0
        return line

    def _detect(self) -> str:
        line = self._first_line()
        for name, known in FORMATS.items():
            if known.mark in line:
                return name
        raise TraceError(
            f"{self.path.name}: the first line {line[:60]!r} is of none of the known formats ({', '.join(FORMATS)})"
        )
