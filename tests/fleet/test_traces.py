"""Readers: what the formats mean, and what becomes of lines that are not what they say."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from sglang_deltastore.fleet.formats import OWN_FORMAT, TraceError
from sglang_deltastore.fleet.prefix_tree import Tree, block_sequence, partial_block
from sglang_deltastore.fleet.traces import Trace

MOONCAKE = {"timestamp": 0, "input_length": 1300, "output_length": 5, "hash_ids": [3, 4, 5]}
HEADER = {"format": OWN_FORMAT, "block_tokens": 16}
OWN = {"time_s": 0.5, "prompt_tokens": 40, "answer_tokens": 9, "blocks": [7, 9]}
SESSION = {"session": "a", "block_size": 64, "tool_tokens": 1, "system_tokens": 1, "requests": []}
TURN = {"t": 0.0, "input_length": 130, "output_length": 1, "hash_ranges": [[1, 2]]}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_mooncake_cuts_the_last_block_at_its_last_whole_page(tmp_path: Path) -> None:
    trace = Trace(write(tmp_path / "t.jsonl", MOONCAKE, {**MOONCAKE, "timestamp": 1500, "input_length": 1026}))
    first, second = trace
    assert (trace.format, trace.pages_per_block) == ("mooncake", 32)
    # 1300 = 2 x 512 + 276, and 276 tokens are 17 whole pages of 16
    assert first.blocks == block_sequence([3, 4]) + partial_block(5, 17, 32)
    assert Tree(32).pages_of(first.blocks) == 1300 // 16
    assert (second.time_s, second.prompt_tokens, second.answer_tokens) == (1.5, 1026, 5)
    assert second.blocks == block_sequence([3, 4])  # two tokens of the third block: no whole page


def test_our_own_format(tmp_path: Path) -> None:
    stored = {**OWN, "stored_blocks": [7, 9, 2]}  # 40 + 9 - 1 = 48 tokens
    plain, known = Trace(write(tmp_path / "t", HEADER, OWN, stored))
    assert plain == (0.5, 40, 9, block_sequence([7, 9]), None)
    assert known.stored == block_sequence([7, 9, 2])


def test_claude_sessions_run_side_by_side_and_never_share(tmp_path: Path) -> None:
    def session(*times: float) -> dict[str, Any]:
        return {**SESSION, "requests": [{**TURN, "t": time} for time in times]}

    path = write(tmp_path / "t", session(0, 10), session(0, 3), session(0, 4))
    times = [request.time_s for request in Trace(path, sessions_at_once=2)]
    # Two begin at 0; the second ends at 3, so the third runs from 3 to 7.
    assert times == [0, 0, 3, 3, 7, 10]
    blocks = {request.blocks for request in Trace(path, sessions_at_once=2)}
    assert blocks == {block_sequence([1, 2]), block_sequence([2**32 + 1, 2**32 + 2]),
                      block_sequence([2**33 + 1, 2**33 + 2])}  # fmt: skip
    assert [r.time_s for r in Trace(path, sessions_at_once=1)] == [0, 10, 10, 13, 13, 17]


def test_azure_requests_share_nothing(tmp_path: Path) -> None:
    head = "TIMESTAMP,ContextTokens,GeneratedTokens"
    rows = ["2023-11-16 18:15:46.6805900,600,44", "2023-11-16 18:15:48.1805901,600,2"]
    first, second = Trace(write(tmp_path / "t.csv", head, *rows))
    assert (first.time_s, second.time_s, second.answer_tokens) == (0.0, 1.5, 2)
    assert first.blocks == block_sequence([0]) + partial_block(1, 5, 32)  # 600 - 512 = 88 = 5 pages
    assert second.blocks == block_sequence([2]) + partial_block(3, 5, 32)


def test_azure_times_are_utc_with_a_zone_and_without(tmp_path: Path) -> None:
    head = "TIMESTAMP,ContextTokens,GeneratedTokens"
    rows = [
        "2024-05-10 00:00:00+00:00,2162,5",
        "2024-05-10 00:00:01.017335+00:00,2399,6",
        "2024-05-10 00:00:02,100,1",
        "2024-05-10 02:00:03.5000009+02:00,100,1",
        "2024-05-10T00:00:04Z,100,1",
    ]
    assert [request.time_s for request in Trace(write(tmp_path / "t.csv", head, *rows))] == [0, 1.017335, 2, 3.5, 4]


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_compressed_traces_are_the_same(tmp_path: Path, suffix: str) -> None:
    plain = write(tmp_path / "t.jsonl", MOONCAKE, MOONCAKE)
    packed = tmp_path / ("t.jsonl" + suffix)
    data = plain.read_bytes()
    packed.write_bytes(zstandard.ZstdCompressor().compress(data) if suffix == ".zst" else gzip.compress(data))
    assert list(Trace(packed)) == list(Trace(plain))


def test_reading_is_a_stream(tmp_path: Path) -> None:
    """The first request is there though the file's end is broken, and reading again starts anew."""
    lines = "".join(json.dumps({**MOONCAKE, "timestamp": i}) + "\n" for i in range(200_000))
    path = tmp_path / "t.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(lines.encode())[:-40_000])
    trace = Trace(path)
    assert next(iter(trace)).time_s == 0
    assert trace.bytes_read < path.stat().st_size
    assert next(iter(trace)).time_s == 0


def test_a_garbled_compressed_file_says_where(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl.zst"
    path.write_bytes(b"this is no zstd frame")
    with pytest.raises(TraceError, match="cannot decompress"):
        Trace(path)


BAD_MOONCAKE = [
    ("{", "line 2"),
    ("[1]", "a JSON object is wanted, not list"),
    ({**MOONCAKE, "user": 3}, "unknown fields ['user']"),
    ({k: v for k, v in MOONCAKE.items() if k != "hash_ids"}, "missing fields ['hash_ids']"),
    ({**MOONCAKE, "timestamp": -1}, "timestamp=-1: a number of at least 10 is wanted"),
    ({**MOONCAKE, "timestamp": 5}, "times must not decrease"),
    ({**MOONCAKE, "timestamp": "5"}, "timestamp='5'"),
    ({**MOONCAKE, "timestamp": 20, "input_length": 0}, "input_length=0"),
    ({**MOONCAKE, "timestamp": 20, "input_length": True}, "input_length=True"),
    ({**MOONCAKE, "timestamp": 20, "output_length": -2}, "output_length=-2"),
    ({**MOONCAKE, "timestamp": 20, "hash_ids": [1]}, "wants 3"),
    ({**MOONCAKE, "timestamp": 20, "hash_ids": [1, 2, -3]}, "the least -3"),
    ({**MOONCAKE, "timestamp": 20, "hash_ids": [1, 2, "x"]}, "line 2"),
    ({**MOONCAKE, "timestamp": 20, "hash_ids": [1, 2, 2**70]}, "line 2"),
    ({**MOONCAKE, "timestamp": 20, "hash_ids": None}, "line 2"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_MOONCAKE, ids=range(len(BAD_MOONCAKE)))
def test_a_bad_line_stops_with_its_number_or_is_left_out_and_counted(tmp_path: Path, bad: Any, message: str) -> None:
    path = write(tmp_path / "t", {**MOONCAKE, "timestamp": 10}, bad, {**MOONCAKE, "timestamp": 30})
    with pytest.raises(TraceError) as stopped:
        list(Trace(path))
    assert "t, line 2: " in str(stopped.value) and message in str(stopped.value)
    assert "--on-error skip" in str(stopped.value)
    trace = Trace(path, on_error="skip")
    assert [request.time_s for request in trace] == [0.01, 0.03]
    assert trace.skipped == 1 and message in trace.errors[0]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**OWN, "blocks": [7]}, "blocks has 1 ids: 40 tokens are 2 whole blocks"),
        ({**OWN, "blocks": [7, -1]}, "at least 0"),
        ({**OWN, "stored_blocks": [7, 9]}, "stored_blocks has 2 ids"),
        ({**OWN, "stored_blocks": [7, 8, 2]}, "do not begin with blocks"),
        ({**OWN, "time_s": float("nan")}, "unexpected character"),
        ({**OWN, "time_s": -0.1}, "time_s=-0.1"),
        ({**OWN, "colour": 1}, "colour"),
    ],
)
def test_bad_lines_of_our_own_format(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError, match="line 2: .*" + message.replace("[", r"\[")):
        list(Trace(write(tmp_path / "t", HEADER, record)))


@pytest.mark.parametrize(
    "change",
    [
        {"block_size": 32},
        {"extra": 1},
        {"requests": [{**TURN, "t": -1.0}]},
        {"requests": [{**TURN, "t": 2.0}, {**TURN, "t": 1.0}]},
        {"requests": [{**TURN, "hash_ranges": [[1, 3]]}]},
        {"requests": [{**TURN, "hash_ranges": [[-1, 2]]}]},
        {"requests": [{**TURN, "hash_ranges": [[2**32, 2]]}]},
        {"requests": [{**TURN, "mood": "good"}]},
        {"requests": 5},
    ],
)
def test_a_bad_session_is_left_out_whole(tmp_path: Path, change: dict[str, Any]) -> None:
    good = {**SESSION, "requests": [TURN]}
    path = write(tmp_path / "t", good, {**good, **change})
    with pytest.raises(TraceError, match="line 2"):
        list(Trace(path))
    trace = Trace(path, on_error="skip")
    assert (len(list(trace)), trace.skipped) == (1, 1)


@pytest.mark.parametrize("row", ["2023-11-16 18:15:46,1", "yesterday,1,1", "2023-11-16 18:15:46.5,0,1",
                                 "2023-11-16 18:15:46.5,5,-1", "2023-11-16 18:15:40.0,5,1"])  # fmt: skip
def test_bad_azure_rows(tmp_path: Path, row: str) -> None:
    good = "2023-11-16 18:15:46.0000000,600,44"
    path = write(tmp_path / "t", "TIMESTAMP,ContextTokens,GeneratedTokens", good, row)
    with pytest.raises(TraceError, match="line 3"):
        list(Trace(path))
    assert len(list(Trace(path, on_error="skip"))) == 1


def test_an_unknown_trace_and_bad_options(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="none of the known formats"):
        Trace(write(tmp_path / "t", {"hello": 1}))
    with pytest.raises(TraceError, match="none of the known formats"):
        Trace(write(tmp_path / "t"))
    path = write(tmp_path / "t", MOONCAKE)
    for options, message in (
        ({"page_tokens": 48}, "choose a page size that divides it"),
        ({"page_tokens": 0}, "at least 1"),
        ({"sessions_at_once": 0}, "at least 1"),
        ({"on_error": "shrug"}, "stop, skip"),
        ({"format": "csv"}, "known are auto, mooncake"),
    ):
        with pytest.raises(ValueError, match=message):
            Trace(path, **options)
    with pytest.raises(TraceError, match="deltastore-trace-2"):
        Trace(write(tmp_path / "t", {"format": "deltastore-trace-2", "block_tokens": 1}), format="deltastore")
    with pytest.raises(OSError):
        Trace(tmp_path / "absent")
