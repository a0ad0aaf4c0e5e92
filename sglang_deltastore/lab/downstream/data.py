"""What the files given hold, and which tasks it allows."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .examples import DataError

TASKS = ("passkey", "kv", "last_word", "piqa", "agreement")


@dataclass
class Data:
    """What the files given hold; each may be missing."""

    filler: str | None = None
    kv_rows: list[dict] = field(default_factory=list)
    piqa_rows: list[dict] = field(default_factory=list)
    passages: list[str] = field(default_factory=list)
    transcripts: list[str] = field(default_factory=list)


def read_data(paths: Sequence[Path]) -> Data:
    """Files, and the files of folders, each taken for what it holds, plain or .zst:

    .txt, .raw      filler text, and passages for last_word (`passages_of`)
    .jsonl          by its first row: PIQA, key-value records, or else transcripts: all text of a row, in order;
                    rows {text} of a file named lambada* are passages
    """
    data = Data()
    for path in paths:
        if not path.exists():
            raise DataError(f"--data {path}: no such file or folder")
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            _read_file(file, data)
    return data


def _read_file(path: Path, data: Data) -> None:
    kind = Path(path.name.removesuffix(".zst")).suffix
    if kind in (".txt", ".raw"):
        text = read_text(path)
        data.filler = (data.filler or "") + text
        data.passages += passages_of(text)
    elif kind == ".jsonl":
        rows = [json.loads(line) for line in read_text(path).splitlines() if line.strip()]
        keys = set(rows[0]) if rows else set()
        if {"goal", "sol1", "sol2", "label"} <= keys:
            data.piqa_rows += rows
        elif {"ordered_kv_records", "key", "value"} <= keys:
            data.kv_rows += rows
        elif path.name.startswith("lambada") and "text" in keys:
            data.passages += [row["text"] for row in rows]
        else:
            data.transcripts += [text for row in rows if (text := "\n".join(texts_of(row)))]


def read_text(path: Path) -> str:
    """A text file, plain or .zst."""
    if path.suffix != ".zst":
        return path.read_text(encoding="utf-8")
    import zstandard

    with path.open("rb") as packed, zstandard.ZstdDecompressor().stream_reader(packed) as stream:
        return io.TextIOWrapper(stream, encoding="utf-8").read()


def passages_of(text: str) -> list[str]:
    """Lines of at least 40 words whose last word, of four letters or more, occurs in them before: cut behind it."""
    found = []
    for line in text.splitlines():
        match = re.fullmatch(r"(.*\s)([A-Za-z]{4,})\s*[.!?]?\s*", line)
        if match and len(line.split()) >= 40 and match[2] in match[1].split():
            found.append(match[1] + match[2])
    return found


def texts_of(row: Any) -> Iterator[str]:
    """Every text of a transcript, however nested, in its order: messages, requests, histories, trees."""
    if isinstance(row, list):
        for item in row:
            yield from texts_of(item)
    elif isinstance(row, dict):
        for key, item in row.items():
            if isinstance(item, str) and key in ("text", "content", "input", "user", "bot"):
                yield item
            elif isinstance(item, (list, dict)):
                yield from texts_of(item)


def possible_tasks(data: Data) -> list[str]:
    """Tasks that the data allows; passkey and kv need none."""
    needs = {"last_word": data.passages, "piqa": data.piqa_rows, "agreement": data.transcripts}
    return [task for task in TASKS if task not in needs or needs[task]]
