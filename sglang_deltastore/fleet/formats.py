"""Formats of traces: from lines to requests, each line checked.

mooncake    JSONL of kvcache-ai/Mooncake, FAST25-release/traces: `timestamp` (ms), `input_length`, `output_length`,
            `hash_ids` of 512-token blocks, the last may be partial. Answers have no ids: they cannot be hit.
claude      JSONL made from callanjfox/kv-cache-tester: one session a line, `hash_ranges` = [[first id, count], ...] of
            whole 64-token blocks, ids local to the session. `sessions_at_once` sessions run side by side; as one ends
            the next of the file begins, so the trace says when requests come within a session and we say how many
            users there are.
azure       CSV of Azure/AzurePublicDataset: TIMESTAMP, ContextTokens, GeneratedTokens. It says nothing of prefixes, so
            no request hits; for arrivals and queues. A time without a zone is UTC.
deltastore  JSONL of our own. First line {"format": "deltastore-trace-1", "block_tokens": B}; then a request a line:
            {"time_s": 0.5, "prompt_tokens": 40, "answer_tokens": 8, "blocks": [7, 9]}. `blocks` are the ids of the
            prompt's whole blocks, equal for equal tokens after equal blocks; optional `stored_blocks` are those of
            prompt and answer without its last token, which is sampled and never stored.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import orjson

from .prefix_tree import ID_BYTES, block_sequence

MOONCAKE_BLOCK_TOKENS = 512
CLAUDE_BLOCK_TOKENS = 64
AZURE_BLOCK_TOKENS = 512
OWN_FORMAT = "deltastore-trace-1"
MAX_TOKENS = 2**31
_SESSION_IDS = 2**32


class TraceError(ValueError):
    """A line that is not what its format says."""


class Request(NamedTuple):
    """One request. `blocks`: the prompt's whole pages; `stored`: those of prompt and answer, where the trace knows."""

    time_s: float
    prompt_tokens: int
    answer_tokens: int
    blocks: bytes
    stored: bytes | None = None


class Trace(Protocol):
    """What a parser knows of the trace that it reads; see traces.Trace."""

    path: Path
    page_tokens: int
    block_tokens: int
    sessions_at_once: int

    @property
    def pages_per_block(self) -> int: ...

    def sequence(self, ids: Any, whole_pages: int) -> bytes: ...

    def attempt(self, parse: Callable[[], Any]) -> Any: ...


def _record(line: bytes, required: set[str], optional: frozenset[str] = frozenset()) -> dict[str, Any]:
    return _checked_keys(orjson.loads(line), required, optional)


def _checked_keys(record: Any, required: set[str], optional: frozenset[str] = frozenset()) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise TraceError(f"a JSON object is wanted, not {type(record).__name__}")
    if not required <= record.keys() <= required | optional:
        missing, unknown = sorted(required - record.keys()), sorted(record.keys() - required - optional)
        raise TraceError(
            f"missing fields {missing}, unknown fields {unknown}; allowed are {sorted(required | optional)}"
        )
    return record


def _integer(record: dict[str, Any], name: str, at_least: int = 0) -> int:
    value = record[name]
    if type(value) is not int or not at_least <= value < MAX_TOKENS:
        raise TraceError(f"{name}={value!r}: a whole number from {at_least} to {MAX_TOKENS - 1} is wanted")
    return value


def _time(value: Any, name: str, earliest: float) -> float:
    if type(value) not in (int, float) or not earliest <= value < float("inf"):
        raise TraceError(f"{name}={value!r}: a number of at least {earliest} is wanted (times must not decrease)")
    return value


def own_block_tokens(line: bytes) -> int:
    """Of our own format, from its first line."""
    header = _record(line, {"format", "block_tokens"})
    if header["format"] != OWN_FORMAT:
        raise TraceError(f"line 1: format {header['format']!r}: known is {OWN_FORMAT!r}")
    return _integer(header, "block_tokens", at_least=1)


def _parse_mooncake(trace: Trace, lines: Iterator[bytes]) -> Iterator[Request]:
    fields = {"timestamp", "input_length", "output_length", "hash_ids"}
    last_ms = 0.0

    def parse(line: bytes) -> Request:
        nonlocal last_ms
        record = _record(line, fields)
        tokens, ids = _integer(record, "input_length", at_least=1), record["hash_ids"]
        expected = -(-tokens // MOONCAKE_BLOCK_TOKENS)
        if len(ids) != expected or min(ids) < 0:
            raise TraceError(
                f"hash_ids has {len(ids)} ids, the least {min(ids, default=None)}: input_length {tokens} wants "
                f"{expected} of at least 0"
            )
        answer = _integer(record, "output_length")
        sequence = trace.sequence(ids, tokens // trace.page_tokens)
        last_ms = _time(record["timestamp"], "timestamp", last_ms)
        return Request(last_ms / 1000, tokens, answer, sequence)

    for line in lines:
        if request := trace.attempt(lambda line=line: parse(line)):
            yield request


def _parse_own(trace: Trace, lines: Iterator[bytes]) -> Iterator[Request]:
    next(lines)  # the header, read when the trace was opened
    last_s = 0.0

    def blocks(record: dict[str, Any], name: str, tokens: int) -> bytes:
        ids = record[name]
        if len(ids) != tokens // trace.block_tokens or (ids and min(ids) < 0):
            raise TraceError(
                f"{name} has {len(ids)} ids: {tokens} tokens are {tokens // trace.block_tokens} whole blocks "
                f"of {trace.block_tokens}, and ids are at least 0"
            )
        return block_sequence(ids)

    def parse(line: bytes) -> Request:
        nonlocal last_s
        record = _record(
            line, {"time_s", "prompt_tokens", "answer_tokens", "blocks"}, optional=frozenset({"stored_blocks"})
        )
        prompt, answer = _integer(record, "prompt_tokens", at_least=1), _integer(record, "answer_tokens")
        whole = blocks(record, "blocks", prompt)
        stored = blocks(record, "stored_blocks", prompt + max(answer - 1, 0)) if "stored_blocks" in record else None
        if stored is not None and not stored.startswith(whole):
            raise TraceError("stored_blocks do not begin with blocks")
        last_s = _time(record["time_s"], "time_s", last_s)
        return Request(last_s, prompt, answer, whole, stored)

    for line in lines:
        if request := trace.attempt(lambda line=line: parse(line)):
            yield request


def _parse_azure(trace: Trace, lines: Iterator[bytes]) -> Iterator[Request]:
    header = next(lines).decode("utf-8-sig", "replace").split(",")
    if header != ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]:
        raise TraceError(f"{trace.path.name}, line 1: columns {header}: TIMESTAMP,ContextTokens,GeneratedTokens wanted")
    fresh_ids = itertools.count()
    began: datetime | None = None
    last_s = 0.0

    def parse(line: bytes) -> Request:
        nonlocal began, last_s
        columns = line.decode().split(",")
        if len(columns) != 3:
            raise TraceError(f"{len(columns)} columns: 3 are wanted")
        at = datetime.fromisoformat(columns[0])
        at = at if at.tzinfo else at.replace(tzinfo=UTC)  # files mix both: their times are UTC
        numbers = {"ContextTokens": int(columns[1]), "GeneratedTokens": int(columns[2])}
        prompt, answer = _integer(numbers, "ContextTokens", at_least=1), _integer(numbers, "GeneratedTokens")
        ids = list(itertools.islice(fresh_ids, -(-prompt // AZURE_BLOCK_TOKENS)))
        sequence = trace.sequence(ids, prompt // trace.page_tokens)
        began = began or at
        last_s = _time((at - began).total_seconds(), "TIMESTAMP, seconds since the first,", last_s)
        return Request(last_s, prompt, answer, sequence)

    for line in lines:
        if request := trace.attempt(lambda line=line: parse(line)):
            yield request


_CLAUDE_SESSION = {"session", "block_size", "tool_tokens", "system_tokens", "requests"}
_CLAUDE_REQUEST = {"t", "input_length", "output_length", "hash_ranges"}
_CLAUDE_OPTIONAL = frozenset({"agent", "think_time", "api_time", "stop", "model"})


def _parse_claude(trace: Trace, lines: Iterator[bytes]) -> Iterator[Request]:
    """Merge sessions by time, `sessions_at_once` of them at once."""
    numbered = itertools.count()

    def sessions() -> Iterator[list[Request]]:
        for line in lines:
            if (requests := trace.attempt(lambda line=line: _claude_session(line))) is not None:
                yield from [_claude_requests(requests, next(numbered))] if requests else []

    waiting = sessions()
    running: list[tuple[float, int, Request, float, Iterator[Request]]] = []

    def begin(at_s: float) -> None:
        if (requests := next(waiting, None)) is not None:
            push(at_s, next(order), requests)

    def push(began_s: float, rank: int, requests: Iterator[Request]) -> bool:
        request = next(requests, None)
        if request is not None:
            heapq.heappush(running, (began_s + request.time_s, rank, request, began_s, requests))
        return request is not None

    order = itertools.count()
    for _ in range(trace.sessions_at_once):
        begin(0.0)
    while running:
        now_s, rank, request, began_s, requests = heapq.heappop(running)
        yield request._replace(time_s=now_s)
        if not push(began_s, rank, requests):
            begin(now_s)


def _claude_session(line: bytes) -> list[dict[str, Any]]:
    """The checked requests of one session, in order of time."""
    session = _record(line, _CLAUDE_SESSION)
    if session["block_size"] != CLAUDE_BLOCK_TOKENS:
        raise TraceError(f"block_size={session['block_size']!r}: {CLAUDE_BLOCK_TOKENS} is wanted")
    last_s = 0.0
    for request in session["requests"]:
        _checked_keys(request, _CLAUDE_REQUEST, _CLAUDE_OPTIONAL)
        tokens = _integer(request, "input_length", at_least=1)
        _integer(request, "output_length")
        last_s = _time(request["t"], "t", last_s)
        ranges = request["hash_ranges"]
        if any(first < 0 or count < 1 or first + count > _SESSION_IDS for first, count in ranges):
            raise TraceError(f"hash_ranges {ranges}: [first id >= 0, count >= 1] pairs below 2**32 are wanted")
        if (blocks := sum(count for _, count in ranges)) != tokens // CLAUDE_BLOCK_TOKENS:
            raise TraceError(f"hash_ranges name {blocks} blocks: input_length {tokens} has {tokens // 64} whole ones")
    return session["requests"]


def _claude_requests(requests: list[dict[str, Any]], session: int) -> Iterator[Request]:
    base = session * _SESSION_IDS
    for request in requests:
        runs = (
            np.arange(base + first, base + first + count, dtype=np.int64) for first, count in request["hash_ranges"]
        )
        blocks = b"".join(run.tobytes() for run in runs)
        assert len(blocks) // ID_BYTES == request["input_length"] // CLAUDE_BLOCK_TOKENS
        yield Request(request["t"], request["input_length"], request["output_length"], blocks)


class Format(NamedTuple):
    """How to read a format. `mark`: what its first line contains and the others' does not; `block_tokens`: None where
    the first line says."""

    parse: Callable[[Trace, Iterator[bytes]], Iterator[Request]]
    mark: bytes
    block_tokens: int | None


FORMATS: dict[str, Format] = {
    "mooncake": Format(_parse_mooncake, b'"hash_ids"', MOONCAKE_BLOCK_TOKENS),
    "claude": Format(_parse_claude, b'"hash_ranges"', CLAUDE_BLOCK_TOKENS),
    "azure": Format(_parse_azure, b"TIMESTAMP,", AZURE_BLOCK_TOKENS),
    "deltastore": Format(_parse_own, OWN_FORMAT.encode(), None),
}
