"""Downstream tasks: prompts exactly as described, scores by hand, and the whole command on a tiny model."""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zstandard
from transformers import LlamaConfig, LlamaForCausalLM

from sglang_deltastore.lab.cache import DeltaStoreCache
from sglang_deltastore.lab.downstream import answers
from sglang_deltastore.lab.downstream.answers import (
    agreed_tokens,
    choices_right,
    greedy,
    log_likelihood,
    prefilled,
    retrieved,
)
from sglang_deltastore.lab.downstream.data import TASKS, Data, passages_of, possible_tasks, read_data, texts_of
from sglang_deltastore.lab.downstream.downstream_command import add_arguments, run
from sglang_deltastore.lab.downstream.examples import (
    Choice,
    DataError,
    Retrieval,
    _random_uuid,
    agreement_prompts,
    kv_examples,
    last_word_examples,
    passkey_examples,
    piqa_examples,
)
from sglang_deltastore.lab.downstream.scores import evaluate, wilson


class Bytes:
    """A tokenizer whose ids are a text's bytes; 0 is BOS."""

    def __init__(self, bos: bool = False) -> None:
        self.bos_token_id = 0 if bos else None

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        begins = [0] if add_special_tokens and self.bos_token_id is not None else []
        return SimpleNamespace(input_ids=begins + list(text.encode()))

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


TOKENIZER = Bytes()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,  # far from uniform logits, so that greedy tokens vary
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def plain() -> None:
    return None


# --- prompts ---


def test_passkey_prompt() -> None:
    filler = "".join(f"line {number:04}\n" for number in range(400))
    for number, example in enumerate(passkey_examples(TOKENIZER, filler, 600, count=3, seed=5)):
        text = TOKENIZER.decode(example.context_ids)
        key = example.answer
        needle = f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
        assert len(example.context_ids) == 600
        assert re.fullmatch(r"[1-9]\d{4}", key)
        assert text.startswith("There is an important info hidden")
        assert text.count(needle) == 1
        assert text.replace(needle, "").split("there.\n")[1] in filler
        before, after = text.split("there.\n")[1].split(needle)
        assert len(before) / (len(before) + len(after)) == pytest.approx((number + 0.5) / 3, abs=0.01)
        assert TOKENIZER.decode(example.question_ids) == "\nWhat is the pass key? The pass key is"
        assert re.search(example.pattern, f" {key}.")[0] == key
        assert re.search(example.pattern, f" {key}1")[0] != key


def test_passkey_fills_with_sentences_without_a_text() -> None:
    (example,) = passkey_examples(TOKENIZER, None, 900, count=1, seed=0)
    assert len(example.context_ids) == 900
    assert TOKENIZER.decode(example.context_ids).count("The grass is green.") >= 6


@pytest.mark.parametrize(("filler", "tokens"), [(None, 100), ("short", 600)])
def test_passkey_without_room_or_text(filler: str | None, tokens: int) -> None:
    with pytest.raises(DataError, match=r"passkey of 100 tokens|filler text of 5 characters"):
        passkey_examples(TOKENIZER, filler, tokens, count=1, seed=0)


def test_a_bos_token_begins_the_context() -> None:
    with_bos = passkey_examples(Bytes(bos=True), None, 500, count=1, seed=0)[0].context_ids
    assert with_bos[0] == 0
    assert 0 not in with_bos[1:]
    assert len(with_bos) == 500


@pytest.mark.parametrize("given_rows", [False, True])
def test_kv_prompt(given_rows: bool) -> None:
    rng = random.Random(1)
    records = [[_random_uuid(rng), _random_uuid(rng)] for _ in range(30)]
    rows = [{"ordered_kv_records": records, "key": records[7][0], "value": records[7][1]}] if given_rows else None
    examples = kv_examples(TOKENIZER, rows, 1000, count=4, seed=0)
    places = []
    for example in examples:
        text = TOKENIZER.decode(example.context_ids + example.question_ids)
        shown, question = text.split("JSON data:\n")[1].split('\n\nKey: "')
        found = list(json.loads(shown.replace(",\n}", "\n}")).items())
        key, ending = question.split('"\n')
        assert ending == 'Corresponding value: "'
        assert dict(found)[key] == example.answer
        intro_bytes = text.index("JSON data:\n{") + len("JSON data:\n{")
        assert len(found) == (1000 - intro_bytes) // 81  # as many as fit: a record is 81 bytes
        assert len(example.context_ids) <= 1000
        if given_rows:
            assert {tuple(record) for record in found} <= {tuple(record) for record in records}
            assert key == records[7][0]
        places.append([name for name, _ in found].index(key))
    assert places == [round((len(found) - 1) * (number + 0.5) / 4) for number in range(4)]


def test_kv_needs_room_for_one_record() -> None:
    with pytest.raises(DataError, match="needs at least"):
        kv_examples(TOKENIZER, None, 100, count=1, seed=0)


def test_last_word_prompt() -> None:
    passage = "He saw the lighthouse from far away and walked along the shore until he stood below the lighthouse"
    filler = "".join(f"line {number:04}\n" for number in range(400))
    (example,) = last_word_examples(TOKENIZER, [passage], filler, 300, count=5, seed=0)
    text = TOKENIZER.decode(example.context_ids + example.question_ids)
    assert len(example.context_ids) == 300
    assert len(example.question_ids) == 1
    assert text.endswith("\n\n" + passage.removesuffix(" lighthouse"))
    assert text.split("\n\n")[0] in filler
    assert example.answer == "lighthouse"
    assert re.search(example.pattern, " lighthouse. The")[0] == "lighthouse"


def test_passages_too_long_for_the_context_are_left_out() -> None:
    assert last_word_examples(TOKENIZER, ["word " * 200], None, 300, count=1, seed=0) == []


def test_passages_of_text() -> None:
    words = "the Castle stood above a river and " * 6
    kept = f" {words}nobody could see the Castle . "
    text = f" = Heading Castle = \n{kept}\n {words}nobody could see the harbour . \n the Castle is the Castle . \n"
    assert passages_of(text) == [kept.rstrip(" .")]


def test_piqa_prompt() -> None:
    rows = [{"goal": f"goal {n}", "sol1": f"first {n}", "sol2": f"second {n}", "label": n % 2} for n in range(20)]
    examples = piqa_examples(TOKENIZER, rows, 200, count=3, seed=0)
    context = TOKENIZER.decode(examples[0].context_ids)
    shots = context.removesuffix("\n\n").split("\n\n")
    tested = set()
    for example in examples:
        assert example.context_ids is examples[0].context_ids
        number = int(re.fullmatch(r"Question: goal (\d+)\nAnswer:", TOKENIZER.decode(example.question_ids))[1])
        assert example.choices == (f" first {number}", f" second {number}")
        assert example.answer == number % 2
        tested.add(number)
    assert len(tested) == 3
    for shot in shots:
        number = int(re.match(r"Question: goal (\d+)", shot)[1])
        assert number not in tested
        assert shot == f"Question: goal {number}\nAnswer: {('first', 'second')[number % 2]} {number}"
    assert 200 - 40 < len(context) <= 200


def test_piqa_without_rows_for_the_context() -> None:
    rows = [{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}] * 3
    with pytest.raises(DataError, match="leave none"):
        piqa_examples(TOKENIZER, rows, 200, count=3, seed=0)


def test_agreement_prompts_are_pieces_of_transcripts() -> None:
    texts = ["too short", "abcdefghij" * 10, "0123456789" * 10]
    prompts = [TOKENIZER.decode(ids) for ids in agreement_prompts(TOKENIZER, texts, 50, 4, seed=0)]
    assert all(len(prompt) == 50 for prompt in prompts)
    assert [prompt in texts[1] for prompt in prompts] == [True, False, True, False]
    assert [prompt in texts[2] for prompt in prompts] == [False, True, False, True]
    with pytest.raises(DataError, match="none of 3 transcripts has 101 tokens"):
        agreement_prompts(TOKENIZER, texts, 101, 1, seed=0)


def test_a_seed_makes_the_same_examples_and_another_seed_others() -> None:
    def made(seed: int) -> list[Retrieval]:
        return passkey_examples(TOKENIZER, "some text " * 300, 500, 3, seed)

    assert made(1) == made(1)
    assert [example.answer for example in made(1)] != [example.answer for example in made(2)]


# --- reading back ---


def test_greedy_equals_generate(model: LlamaForCausalLM) -> None:
    context, question = list(b"some context that is cached"), list(b"and a question")
    with torch.inference_mode():
        found = greedy(model, prefilled(model, context, plain), question, 12)
        expected = model.generate(torch.tensor([context + question]), max_new_tokens=12, do_sample=False)
    assert found == expected[0, len(context) + len(question) :].tolist()
    assert len(set(found)) > 3


def test_greedy_ends_before_the_end_of_text(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    context, question = list(b"some context that is cached"), list(b"and a question")
    with torch.inference_mode():
        found = greedy(model, prefilled(model, context, plain), question, 12)
        monkeypatch.setattr(model.generation_config, "eos_token_id", [found[5], 999])
        ended = greedy(model, prefilled(model, context, plain), question, 12)
    assert ended == found[: found.index(found[5])]


def test_log_likelihood(model: LlamaForCausalLM) -> None:
    context, question, choice = list(b"some context"), list(b"question"), list(b" choice")
    with torch.inference_mode():
        found = log_likelihood(model, prefilled(model, context, plain), question, choice)
        logits = model(torch.tensor([context + question + choice])).logits[0].log_softmax(-1)
    first = len(context) + len(question)
    expected = sum(float(logits[first + place - 1, token]) for place, token in enumerate(choice))
    assert found == pytest.approx(expected, rel=1e-5)


def test_retrieved_takes_the_first_match(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    example = Retrieval([1], [2], "71432", r"\d+")
    for answer, right in ((" 71432.", True), (" 714321", False), (" 1 71432", False), (" none", False)):
        monkeypatch.setattr(answers, "greedy", lambda *_, answer=answer: list(answer.encode()))
        assert retrieved(model, TOKENIZER, example, plain) is right


def test_choices_are_scored_per_character_from_untouched_caches(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def likelihood(model: object, cache: object, question_ids: list[int], choice_ids: list[int]) -> float:
        seen.append(cache.get_seq_length())
        cache.layers[0].keys = None  # what a choice does to its cache, no other sees
        return {b" long choice": -12.0, b" no": -6.0}[bytes(choice_ids)]

    monkeypatch.setattr(answers, "log_likelihood", likelihood)
    choices = (" long choice", " no")
    examples = [Choice([1, 2, 3], [4], choices, answer) for answer in (0, 1)]
    with torch.inference_mode():
        assert list(choices_right(model, TOKENIZER, examples, plain)) == [True, False]
    assert seen == [3] * 4


@pytest.mark.parametrize(
    ("first", "second", "agreed"),
    [
        ([1, 2, 3], [1, 2, 3], 8),
        ([1, 2, 3], [1, 9, 3], 1),
        ([5], [6], 0),
        ([1, 2], [1, 2, 3], 2),  # one ended early
        ([], [], 8),
    ],
)
def test_agreed_tokens(first: list[int], second: list[int], agreed: int) -> None:
    assert agreed_tokens(first, second, limit=8) == agreed


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81/263, 15/148, 0/20, 1/29
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson(right: int, total: int, low: float, high: float) -> None:
    assert wilson(right, total) == pytest.approx((low, high), abs=1e-4)


def test_agreement_with_itself_is_full_and_a_rough_cache_agrees_less(model: LlamaForCausalLM) -> None:
    data = Data(transcripts=["the quick brown fox jumps over the lazy dog " * 6])
    caches = {"plain": plain, "conservative": lambda: DeltaStoreCache(model.config, tier="conservative")}
    same, rough = evaluate(model, TOKENIZER, "agreement", data, caches, 100, count=3, new_tokens=10)
    assert (same.right, same.total, same.agreed_mean, same.agreed_limit) == (3, 3, 10, 10)
    assert rough.agreed_mean < 10
    assert rough.right < 3


@pytest.mark.parametrize("task", TASKS)
def test_every_task_runs_through_both_caches(task: str, model: LlamaForCausalLM) -> None:
    passage = "He saw the lighthouse from far away and stood below the lighthouse"
    rows = [{"goal": f"goal {n}", "sol1": "this", "sol2": "that", "label": n % 2} for n in range(9)]
    data = Data(piqa_rows=rows, passages=[passage] * 2, transcripts=["a transcript " * 80])
    caches = {"plain": plain, "lossless": lambda: DeltaStoreCache(model.config, tier="lossless")}
    scores = evaluate(model, TOKENIZER, task, data, caches, 330, count=2, new_tokens=3)
    again = evaluate(model, TOKENIZER, task, data, caches, 330, count=2, new_tokens=3)
    assert scores == again
    assert [(score.task, score.cache, score.total) for score in scores] == [
        (task, "plain", 2),
        (task, "lossless", 2),
    ]
    assert scores[0].row()["rate"] == scores[0].right / 2


def test_an_unknown_task_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(DataError, match="'sums': unknown; known are passkey"):
        evaluate(model, TOKENIZER, "sums", Data(), {}, 10, 1)


# --- files ---


def write(path: Path, rows: list[dict], packed: bool = False) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(zstandard.compress(text.encode()) if packed else text.encode())
    return path


def test_files_are_taken_for_what_they_hold(tmp_path: Path) -> None:
    write(tmp_path / "piqa.jsonl.zst", [{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}], packed=True)
    write(tmp_path / "records.jsonl", [{"ordered_kv_records": [["k", "v"]], "key": "k", "value": "v"}])
    write(tmp_path / "lambada_test.jsonl", [{"text": "a passage"}])
    write(tmp_path / "plain.jsonl", [{"text": "a transcript"}])
    write(
        tmp_path / "sessions.jsonl.zst",
        [{"session": "x", "requests": [{"t_us": 1, "input": "first"}, {"t_us": 2, "input": "second"}]}],
        packed=True,
    )
    write(tmp_path / "solved.jsonl", [{"question": "1 + 1", "answer": "2"}])  # no text of a transcript
    (tmp_path / "filler.txt.zst").write_bytes(zstandard.compress("some filler, café".encode()))
    (tmp_path / "SOURCE.md").write_text("not data")
    data = read_data([tmp_path])
    assert data.filler == "some filler, café"
    assert [row["label"] for row in data.piqa_rows] == [1]
    assert [row["key"] for row in data.kv_rows] == ["k"]
    assert data.passages == ["a passage"]
    assert data.transcripts == ["a transcript", "first\nsecond"]
    assert possible_tasks(data) == list(TASKS)
    assert possible_tasks(Data()) == ["passkey", "kv"]
    assert read_data([tmp_path / "records.jsonl"]).kv_rows == data.kv_rows


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]},
        {"history": [{"user": "one", "bot": "two"}], "id": 3},
        {"id": "no text", "tree": {"role": "user", "text": "one", "replies": [{"text": "two"}]}},
        {"messages": [{"content": [{"type": "text", "text": "one"}]}, {"content": "two"}, {"content": None}]},
    ],
)
def test_texts_of_transcripts(row: dict) -> None:
    assert list(texts_of(row)) == ["one", "two"]


# --- the command ---


def parsed(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model_folder(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer of single characters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    vocabulary = {chr(code) if code else "?": code for code in range(128)} | {"?": 63}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def test_the_command_writes_a_row_for_each_cache(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    data = write(tmp_path / "transcripts.jsonl", [{"text": "a transcript " * 80}])
    arguments = ("--model", model_folder, "--data", data, "--examples", 2, "--new-tokens", 3, "--seed", 4)
    peer = "TurboQuant vLLM 3bit"
    chosen = ("--tokens", 400, "--tier", "k4v2", "lossless", "--against", peer, "--json", file)
    assert run(parsed(*arguments, *chosen)) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    caches = ["plain", "k4v2", "lossless", peer]
    expected = [(task, cache) for task in ("passkey", "kv") for cache in caches]
    expected += [("agreement", cache) for cache in caches[1:]]
    assert [(row["task"], row["cache"]) for row in rows] == expected
    assert {(row["model"], row["seed"], row["context_tokens"], row["total"]) for row in rows} == {
        (model_folder.name, 4, 400, 2)
    }
    assert all(row["low"] <= row["rate"] <= row["high"] for row in rows)
    shown = capsys.readouterr().out
    assert "passkey" in shown
    assert "k4v2" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "{missing}"), "config.json is missing"),
        (("--model", "{model}", "--data", "{missing}"), "no such file or folder"),
        (("--model", "{model}", "--tasks", "piqa"), "--tasks piqa: --data holds nothing"),
        (("--model", "{model}", "--examples", "0"), "must be at least 1"),
        (("--model", "{model}", "--against", "nobody"), "--against nobody: unknown; known are KIVI-4"),
        (("--model", "{model}", "--tokens", "20"), "passkey of 20 tokens"),
    ],
)
def test_errors_are_one_line(
    arguments: tuple[str, ...],
    message: str,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"missing": tmp_path / "missing", "model": model_folder}
    assert run(parsed(*(argument.format(**places) for argument in arguments))) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("deltastore downstream: ")
    assert message in error
