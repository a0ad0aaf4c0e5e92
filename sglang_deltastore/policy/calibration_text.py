"""Tokens to calibrate on: the text that comes with the package, or one of the user's own.

The shipped one is prose, dialogues, code, tool schemas, a dozen languages and numbers, in sections. A part of each
section is taken, as many tokens as are asked for in all, so that a short calibration sees every kind of text too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from .calibration import CalibrationError

TOKENS = 1024
"""Of a sequence."""
LEAST_TOKENS = 256
"""Of a text: fewer say nothing about a model."""
_SHIPPED = "calibration_text.json"


def read(path: Path) -> str:
    """A user's text. Raises CalibrationError where it cannot be read or is empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"{path}: cannot be read as text ({error}); allowed is a file of plain text in UTF-8"
        ) from error
    if not text.strip():
        raise CalibrationError(f"{path}: is empty; allowed is a text of at least {LEAST_TOKENS} tokens")
    return text


def name_of(text: str | None) -> str:
    """Eight hexadecimal digits that tell one text from another; None: the shipped text."""
    content = files(__package__).joinpath(_SHIPPED).read_bytes() if text is None else text.encode()
    return hashlib.sha256(content).hexdigest()[:8]


def sequences(tokenizer: Any, count: int, tokens: int, text: str | None = None) -> list[torch.Tensor]:
    """Up to `count` sequences of up to `tokens` token ids each, int64 on the host; each begins as the tokenizer begins
    a text (BOS). text None: the shipped one, parts of all its sections, of several kinds in each sequence; else the
    text's first tokens. Raises CalibrationError for a text of less than LEAST_TOKENS."""
    start = _start(tokenizer)
    step = tokens - len(start)
    room = count * step
    if text is None:
        sections = [_tokens(tokenizer, _rendered(section, tokenizer)) for section in _shipped()]
        share = min(1.0, room / sum(map(len, sections)))
        token_ids = [token for section in sections for token in section[: int(len(section) * share)]]
    else:
        token_ids = _tokens(tokenizer, text)[:room]
        if len(token_ids) < LEAST_TOKENS:
            raise CalibrationError(
                f"the text to calibrate on has {len(token_ids)} tokens; allowed is {LEAST_TOKENS} and more; give a "
                "longer one, like what will be served"
            )
    parts = [token_ids[at : at + step] for at in range(0, len(token_ids), step)]
    return [torch.tensor([*start, *part]) for part in parts if len(part) >= LEAST_TOKENS or len(parts) == 1]


def first_positions(count: int, tokens: int, context_tokens: int | None) -> list[int]:
    """Where so many sequences of so many tokens begin, evenly over a model's context; None: it does not say.

    RoPE turns keys and queries with their positions. A basis that was fitted on the first few thousand loses more than
    none at positions that it has not seen, and what a sequence attends to depends on distances alone: so each of them
    is read as if it lay somewhere else in a long context (kernels/DECISIONS.md).
    """
    room = max((context_tokens or tokens) - tokens, 0)
    return [index * room // max(count - 1, 1) for index in range(count)]


def _shipped() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(files(__package__).joinpath(_SHIPPED).read_text(encoding="utf-8"))
    return found


def _rendered(section: dict[str, Any], tokenizer: Any) -> str:
    """A section's text; a dialogue as the model's chat template writes it, where the model has one."""
    if "text" in section:
        return f"{section['text']}\n\n"
    messages: Sequence[dict[str, str]] = section["messages"]
    if getattr(tokenizer, "chat_template", None):
        from jinja2 import TemplateError

        for form in (messages, _without_system(messages)):  # some templates refuse a system message
            with suppress(TemplateError):
                return str(tokenizer.apply_chat_template(form, tokenize=False))
    return "".join(f"{message['role'].capitalize()}: {message['content']}\n\n" for message in messages)


def _without_system(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return [message for message in messages if message["role"] != "system"]


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _start(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text."""
    plain, whole = _tokens(tokenizer, "a"), tokenizer.encode("a")
    return whole[: whole.index(plain[0])] if plain and plain[0] in whole else []
