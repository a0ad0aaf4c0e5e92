"""The tokens that a calibration reads: of the shipped text, and of a user's."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sglang_deltastore.policy import calibration_text
from sglang_deltastore.policy.calibration import CalibrationError
from sglang_deltastore.policy.calibration_text import LEAST_TOKENS, first_positions, name_of, read, sequences


def characters(begins_with: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters; begins_with: what it puts before a text."""
    ids = {chr(code): code for code in range(256)} | {"<s>": 256, "?": 257}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if begins_with:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begins_with} $A", special_tokens=[(begins_with, 256)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_the_shipped_text_is_small_and_of_every_kind() -> None:
    sections = calibration_text._shipped()
    assert len(json.dumps(sections, ensure_ascii=False).encode()) < 200_000
    assert {section["kind"] for section in sections} == {"prose", "chat", "code", "tools", "languages", "numbers"}
    languages = {section["language"] for section in sections if section["kind"] == "languages"}
    assert len(languages) >= 10


def test_a_part_of_every_section_fills_the_sequences(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    found = sequences(tokenizer, count=4, tokens=2048)
    assert [len(ids) for ids in found] == [2048, 2048, 2048, pytest.approx(2048, abs=60)]
    texts = [tokenizer.decode(ids.tolist()) for ids in found]
    of_kind: dict[str, set[int]] = defaultdict(set)
    for section in calibration_text._shipped():
        beginning = section["text"] if "text" in section else section["messages"][0]["content"]
        of_kind[section["kind"]] |= {at for at, text in enumerate(texts) if beginning[:40] in text}
        assert beginning[:40] in "".join(texts)
    assert all(len(where) > 1 for where in of_kind.values()), "no kind lies at one place of the context alone"
    assert "<|im_start|>user\n" in texts[0], "dialogues are written as the model's template writes them"


@pytest.mark.parametrize(
    ("count", "tokens", "context_tokens", "positions"),
    [
        (4, 2048, 8192, [0, 2048, 4096, 6144]),
        (4, 2048, 131072, [0, 43008, 86016, 129024]),
        (3, 512, 512, [0, 0, 0]),
        (2, 600, 512, [0, 0]),
        (1, 512, 4096, [0]),
        (2, 512, None, [0, 0]),
        (0, 512, 4096, []),
    ],
)
def test_sequences_lie_all_over_the_context(
    count: int, tokens: int, context_tokens: int | None, positions: list[int]
) -> None:
    assert first_positions(count, tokens, context_tokens) == positions


def test_sequences_begin_as_the_tokenizer_begins_a_text() -> None:
    text = "abcdefgh" * 100
    for begins_with, first in (("<s>", [256, ord("a")]), (None, [ord("a"), ord("b")])):
        found = sequences(characters(begins_with), count=2, tokens=300, text=text)
        assert [len(ids) for ids in found] == [300, 300]
        assert found[0][:2].tolist() == first
        assert (found[1][0] == 256) == (begins_with is not None)


def test_a_dialogue_without_template_or_with_one_that_knows_no_system() -> None:
    tokenizer = characters()
    section: dict[str, Any] = {
        "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    }
    assert calibration_text._rendered(section, tokenizer) == "System: be kind\n\nUser: hello\n\n"
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    )
    assert calibration_text._rendered(section, tokenizer) == "[hello]"


@pytest.mark.parametrize("characters_long", [0, 1, LEAST_TOKENS - 1])
def test_a_short_text_is_refused(characters_long: int) -> None:
    with pytest.raises(CalibrationError, match=f"has {characters_long} tokens; allowed is {LEAST_TOKENS} and more"):
        sequences(characters(), count=2, tokens=512, text="x" * characters_long)


def test_a_text_that_leaves_a_short_rest_is_cut() -> None:
    assert [len(ids) for ids in sequences(characters(), 3, 300, "x" * 650)] == [300, 300]
    assert [len(ids) for ids in sequences(characters(), 3, 4096, "x" * LEAST_TOKENS)] == [LEAST_TOKENS]


def test_files_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot be read as text"):
        read(tmp_path / "missing")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="cannot be read as text"):
        read(tmp_path / "binary")
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(CalibrationError, match="is empty"):
        read(tmp_path / "empty")


def test_texts_are_told_apart() -> None:
    assert len({name_of(None), name_of("a"), name_of("b")}) == 3
    assert name_of("a") == name_of("a")
