"""`deltastore downstream`: what a compressed context costs a task, beside the plain cache in the same run.

Every example is a context that is cached first and a question read behind it, so that each answer
depends on what the cache kept. Tasks, at each context length:

    passkey    five digits hidden in filler text (arXiv:2305.16300); the first number of the answer
    kv         a value by its key in a JSON object of UUIDs (arXiv:2307.03172); the first UUID
    last_word  a passage's last word, which the passage named before (LAMBADA, arXiv:1606.06031)
    piqa       the likelier of two solutions (arXiv:1911.11641), behind solved questions of the same file
    agreement  tokens until greedy decoding leaves the plain cache's, on recorded transcripts
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import random
import re
import statistics
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from sglang_deltastore.lab import peers, published
from sglang_deltastore.tiers import DEFAULT_TIER, TIERS

#: returns a fresh transformers cache for one sequence, or None for the plain one
CacheFactory = Callable[[], Any]

TASKS = ("passkey", "kv", "last_word", "piqa", "agreement")
_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_WORD = r"[A-Za-z][\w'-]*"
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"


class DataError(ValueError):
    """The data given cannot make what was asked for."""


# --- examples ---


@dataclass(frozen=True)
class Retrieval:
    """Greedy tokens after the question; right when the first match of `pattern` is `answer`."""

    context_ids: list[int]
    question_ids: list[int]
    answer: str
    pattern: str


@dataclass(frozen=True)
class Choice:
    """Right when the choice of the greatest log-likelihood per character is number `answer`."""

    context_ids: list[int]
    question_ids: list[int]
    choices: tuple[str, ...]
    answer: int


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` alone."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def first_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: its BOS token, or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer("a").input_ids)[:1] == [bos] else []


def filler_ids(tokenizer: Any, text: str | None, tokens: int, rng: random.Random) -> list[int]:
    """`tokens` ids of consecutive text from a random place, or of generated sentences without `text`."""
    if text is None:
        sentence = encode(tokenizer, _FILLER)
        return (sentence * (tokens // len(sentence) + 1))[:tokens]
    # a token is at least one character, and rarely more than eight
    start = rng.randrange(max(1, len(text) - 8 * tokens))
    ids = encode(tokenizer, text[start : start + 8 * tokens])
    if len(ids) < tokens:
        raise DataError(f"filler text of {len(text)} characters: too short for {tokens} tokens; give a longer file")
    return ids[:tokens]


def passkey_examples(tokenizer: Any, filler: str | None, tokens: int, count: int, seed: int) -> list[Retrieval]:
    """Contexts of exactly `tokens` tokens, the key at depths spread evenly from the start to the end."""
    rng = random.Random(seed)
    intro = first_ids(tokenizer) + encode(
        tokenizer,
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
        "I will quiz you about the important information there.\n",
    )
    examples = []
    for number in range(count):
        key = str(rng.randrange(10_000, 100_000))
        needle = encode(tokenizer, f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n")
        room = tokens - len(intro) - len(needle)
        if room < 0:
            raise DataError(f"passkey of {tokens} tokens: needs at least {len(intro) + len(needle)}")
        filling = filler_ids(tokenizer, filler, room, rng)
        depth = round(room * (number + 0.5) / count)
        context = intro + filling[:depth] + needle + filling[depth:]
        question = encode(tokenizer, "\nWhat is the pass key? The pass key is")
        examples.append(Retrieval(context, question, key, r"\d+"))
    return examples


def kv_examples(tokenizer: Any, rows: Sequence[dict] | None, tokens: int, count: int, seed: int) -> list[Retrieval]:
    """Contexts of at most `tokens` tokens. rows: lost-in-the-middle's {ordered_kv_records, key, value}; random
    UUIDs without. The wanted record's place is spread evenly; every example has as many records as fit."""
    rng = random.Random(seed)
    intro = first_ids(tokenizer) + encode(
        tokenizer,
        "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{",
    )
    examples = []
    for number in range(count):
        if rows:
            row = rows[number % len(rows)]
            wanted = (row["key"], row["value"])
            others = [tuple(record) for record in row["ordered_kv_records"] if record[0] != row["key"]]
        else:
            wanted, *others = (tuple(_random_uuid(rng) for _ in range(2)) for _ in range(tokens // 20))
        lines = [encode(tokenizer, f' "{key}": "{value}",\n') for key, value in (wanted, *others)]
        question = encode(tokenizer, f'}}\n\nKey: "{wanted[0]}"\nCorresponding value: "')
        kept, used = [], len(intro) + len(lines[0])
        for line in lines[1:]:
            if used + len(line) > tokens:
                break
            kept.append(line)
            used += len(line)
        if used > tokens:
            raise DataError(f"kv of {tokens} tokens: needs at least {used}")
        kept.insert(round(len(kept) * (number + 0.5) / count), lines[0])
        examples.append(Retrieval([*intro, *chain.from_iterable(kept)], question, wanted[1], _UUID))
    return examples


def _random_uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def last_word_examples(
    tokenizer: Any, passages: Sequence[str], filler: str | None, tokens: int, count: int, seed: int
) -> list[Retrieval]:
    """Contexts of exactly `tokens` tokens: filler, then a passage up to its last word. The context's last token is
    the question, so the passage itself is read from the cache."""
    rng = random.Random(seed)
    examples = []
    for passage in rng.sample(list(passages), min(count, len(passages))):
        body, word = passage.rstrip().rsplit(maxsplit=1)
        body_ids = encode(tokenizer, "\n\n" + body)
        room = tokens + 1 - len(body_ids) - len(first_ids(tokenizer))
        if room < 0:
            continue  # a passage longer than the context
        ids = first_ids(tokenizer) + filler_ids(tokenizer, filler, room, rng) + body_ids
        examples.append(Retrieval(ids[:-1], ids[-1:], word, _WORD))
    return examples


def passages_of(text: str) -> list[str]:
    """Lines of at least 40 words whose last word, of four letters or more, occurs in them before: cut behind it."""
    found = []
    for line in text.splitlines():
        match = re.fullmatch(r"(.*\s)([A-Za-z]{4,})\s*[.!?]?\s*", line)
        if match and len(line.split()) >= 40 and match[2] in match[1].split():
            found.append(match[1] + match[2])
    return found


def piqa_examples(tokenizer: Any, rows: Sequence[dict], tokens: int, count: int, seed: int) -> list[Choice]:
    """rows: PIQA's {goal, sol1, sol2, label}. All share one context: other rows, solved, as many as fit `tokens`."""
    rows = random.Random(seed).sample(list(rows), len(rows))
    context = first_ids(tokenizer)
    for row in rows[count:]:
        solution = (row["sol1"], row["sol2"])[row["label"]]
        shot = encode(tokenizer, f"Question: {row['goal']}\nAnswer: {solution}\n\n")
        if len(context) + len(shot) > tokens:
            break
        context = context + shot
    if len(context) == len(first_ids(tokenizer)):
        raise DataError(f"piqa: {len(rows)} rows leave none to fill a context of {tokens} tokens; ask for fewer")
    return [
        Choice(
            context,
            encode(tokenizer, f"Question: {row['goal']}\nAnswer:"),
            (" " + row["sol1"], " " + row["sol2"]),
            row["label"],
        )
        for row in rows[:count]
    ]


def agreement_prompts(
    tokenizer: Any, transcripts: Sequence[str], tokens: int, count: int, seed: int
) -> list[list[int]]:
    """`count` pieces of exactly `tokens` tokens, from random places of transcripts long enough, each in turn."""
    rng = random.Random(seed)
    long_enough = [ids for ids in (encode(tokenizer, text) for text in transcripts) if len(ids) >= tokens]
    if not long_enough:
        raise DataError(f"agreement: none of {len(transcripts)} transcripts has {tokens} tokens; ask for fewer")
    prompts = []
    for number in range(count):
        ids = long_enough[number % len(long_enough)]
        start = rng.randrange(len(ids) - tokens + 1)
        prompts.append(ids[start : start + tokens])
    return prompts


# --- reading a context back ---


def prefilled(model: Any, context_ids: Sequence[int], make_cache: CacheFactory) -> Any:
    """A fresh cache that holds the context."""
    from transformers import DynamicCache

    cache = make_cache()
    if cache is None:
        cache = DynamicCache(config=model.config)
    model(_row(model, context_ids), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def greedy(model: Any, cache: Any, question_ids: Sequence[int], new_tokens: int) -> list[int]:
    """Up to `new_tokens` greedy ids behind the question; ends before the model's end-of-text token."""
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    found: list[int] = []
    ids = question_ids
    while len(found) < new_tokens:
        logits = model(_row(model, ids), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = int(logits[0, -1].argmax())
        if token in ends:
            break
        found.append(token)
        ids = [token]
    return found


def log_likelihood(model: Any, cache: Any, question_ids: Sequence[int], choice_ids: Sequence[int]) -> float:
    """Nats of the choice behind the question. The cache grows."""
    ids = [*question_ids, *choice_ids]
    logits = model(_row(model, ids), past_key_values=cache, use_cache=True).logits[0].float().log_softmax(-1)
    first = len(question_ids)
    return sum(float(logits[first + place - 1, token]) for place, token in enumerate(choice_ids))


def _row(model: Any, ids: Sequence[int]) -> torch.Tensor:
    return torch.tensor([list(ids)], device=model.device)


def retrieved(model: Any, tokenizer: Any, example: Retrieval, make_cache: CacheFactory) -> bool:
    cache = prefilled(model, example.context_ids, make_cache)
    # some tokens more than the answer has: a space, a quote, the next word
    new_tokens = len(encode(tokenizer, " " + example.answer)) + 4
    answer = tokenizer.decode(greedy(model, cache, example.question_ids, new_tokens))
    match = re.search(example.pattern, answer)
    return bool(match) and match[0] == example.answer


def choices_right(model: Any, tokenizer: Any, examples: Sequence[Choice], make_cache: CacheFactory) -> Iterator[bool]:
    """One prefill for all: the examples share their context, as requests share a tool prompt."""
    cache = prefilled(model, examples[0].context_ids, make_cache)
    for example in examples:
        assert example.context_ids == examples[0].context_ids, "choices must share one context"
        scores = [
            log_likelihood(model, copy.deepcopy(cache), example.question_ids, encode(tokenizer, choice)) / len(choice)
            for choice in example.choices
        ]
        yield scores.index(max(scores)) == example.answer


def agreed_tokens(first: Sequence[int], second: Sequence[int], limit: int) -> int:
    """Tokens before the two continuations differ; `limit` where they never do (both may have ended early)."""
    if first == second:
        return limit
    return next(
        (place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )


# --- scores ---


@dataclass(frozen=True)
class Score:
    """One row. For "agreement", right means agreed to the last token, and mean and median count tokens."""

    task: str
    cache: str
    context_tokens: int
    right: int
    total: int
    low: float = field(init=False)
    """Wilson's 95% interval of right / total."""
    high: float = field(init=False)
    agreed_mean: float | None = None
    agreed_median: float | None = None
    agreed_limit: int | None = None

    def __post_init__(self) -> None:
        low, high = wilson(self.right, self.total)
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)

    def row(self) -> dict[str, Any]:
        return {**asdict(self), "rate": self.right / self.total}


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval (JASA 22, 1927); z standard deviations, 1.96 for 95%."""
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / total + spread / (4 * total)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass
class Data:
    """What the files given hold; each may be missing."""

    filler: str | None = None
    kv_rows: list[dict] = field(default_factory=list)
    piqa_rows: list[dict] = field(default_factory=list)
    passages: list[str] = field(default_factory=list)
    transcripts: list[str] = field(default_factory=list)


@torch.inference_mode()
def evaluate(
    model: Any,
    tokenizer: Any,
    task: str,
    data: Data,
    caches: dict[str, CacheFactory],
    context_tokens: int,
    count: int,
    seed: int = 0,
    new_tokens: int = 64,
) -> list[Score]:
    """One score for each of `caches` (name -> factory) on the same `count` examples. Deterministic for a seed.

    "agreement" compares with the plain cache, whatever `caches` holds.
    """
    if task == "agreement":
        prompts = agreement_prompts(tokenizer, data.transcripts, context_tokens, count, seed)
        return _agreement_scores(model, prompts, caches, new_tokens)
    if task == "passkey":
        examples = passkey_examples(tokenizer, data.filler, context_tokens, count, seed)
    elif task == "kv":
        examples = kv_examples(tokenizer, data.kv_rows, context_tokens, count, seed)
    elif task == "last_word":
        examples = last_word_examples(tokenizer, data.passages, data.filler, context_tokens, count, seed)
    elif task == "piqa":
        examples = piqa_examples(tokenizer, data.piqa_rows, context_tokens, count, seed)
    else:
        raise DataError(f"task {task!r}: unknown; known are {', '.join(TASKS)}")
    if not examples:
        raise DataError(f"{task}: no example of {context_tokens} tokens in the data given")
    scores = []
    for name, make_cache in caches.items():
        if task == "piqa":
            outcomes = choices_right(model, tokenizer, examples, make_cache)
        else:
            outcomes = (retrieved(model, tokenizer, example, make_cache) for example in examples)
        right = sum(tqdm(outcomes, f"{task} {context_tokens} {name}", len(examples), leave=False))
        scores.append(Score(task, name, context_tokens, right, len(examples)))
    return scores


def _agreement_scores(
    model: Any, prompts: Sequence[Sequence[int]], caches: dict[str, CacheFactory], new_tokens: int
) -> list[Score]:
    def continued(prompt: Sequence[int], make_cache: CacheFactory) -> list[int]:
        return greedy(model, prefilled(model, prompt[:-1], make_cache), prompt[-1:], new_tokens)

    tokens = len(prompts[0])
    plain = [continued(prompt, lambda: None) for prompt in tqdm(prompts, f"agreement {tokens} plain", leave=False)]
    scores = []
    for name, make_cache in caches.items():
        agreed = [
            agreed_tokens(expected, continued(prompt, make_cache), new_tokens)
            for prompt, expected in zip(tqdm(prompts, f"agreement {tokens} {name}", leave=False), plain, strict=True)
        ]
        scores.append(
            Score(
                "agreement",
                name,
                tokens,
                right=agreed.count(new_tokens),
                total=len(agreed),
                agreed_mean=statistics.fmean(agreed),
                agreed_median=statistics.median(agreed),
                agreed_limit=new_tokens,
            )
        )
    return scores


# --- files ---


def read_text(path: Path) -> str:
    """A text file, plain or .zst."""
    if path.suffix != ".zst":
        return path.read_text(encoding="utf-8")
    import zstandard

    with path.open("rb") as packed, zstandard.ZstdDecompressor().stream_reader(packed) as stream:
        return io.TextIOWrapper(stream, encoding="utf-8").read()


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


# --- the command ---


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="a Hugging Face causal LM")
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="files or folders: .txt or .raw filler, .jsonl of PIQA, key-value rows or transcripts; each may be .zst",
    )
    parser.add_argument("--tier", nargs="+", default=[DEFAULT_TIER], choices=list(TIERS), help="tiers to compare")
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="NAME", help="peers by their row's name in `deltastore quality`"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="default: all that the data allows")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096], help="lengths of the contexts")
    parser.add_argument("--examples", type=int, default=20, help="examples of each task and length; default: 20")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens that may agree; default: 64")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one row a line")


def run(args: argparse.Namespace) -> int:
    try:
        rows = _run(args)
    except DataError as error:
        print(f"deltastore downstream: {error}", file=sys.stderr)
        return 1
    _show(rows)
    return 0


def _run(args: argparse.Namespace) -> list[dict[str, Any]]:
    if min(args.tokens) < 1 or args.examples < 1 or args.new_tokens < 1:
        raise DataError("--tokens, --examples and --new-tokens must be at least 1")
    if not (args.model / "config.json").exists():
        raise DataError(f"--model {args.model}: no Hugging Face model folder (config.json is missing)")
    data = read_data(args.data)
    tasks = args.tasks or possible_tasks(data)
    if missing := sorted(set(tasks) - set(possible_tasks(data))):
        raise DataError(f"--tasks {' '.join(missing)}: --data holds nothing for it; see `deltastore downstream --help`")

    known = {method.name: method for method in (*peers.methods(residual=True), published.absmax(4, 2))}
    if unknown := sorted(set(args.against) - set(known)):
        raise DataError(f"--against {', '.join(unknown)}: unknown; known are {', '.join(known)}")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sglang_deltastore.lab.cache import DeltaStoreCache
    from sglang_deltastore.lab.simulated import SimulatedCache

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    caches: dict[str, CacheFactory] = {"plain": lambda: None}
    for tier in args.tier:
        caches[tier] = lambda tier=tier: DeltaStoreCache(model.config, tier=tier)
    for name in args.against:
        caches[name] = lambda name=name: SimulatedCache(model.config, known[name])
    rows = []
    for task in tasks:
        for tokens in args.tokens:
            compared = {name: make for name, make in caches.items() if task != "agreement" or name != "plain"}
            scores = evaluate(model, tokenizer, task, data, compared, tokens, args.examples, args.seed, args.new_tokens)
            rows += [{"model": args.model.name, "seed": args.seed, **score.row()} for score in scores]
            if args.json:  # after each task, so that a run that is stopped leaves what it found
                args.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def possible_tasks(data: Data) -> list[str]:
    """Tasks that the data allows; passkey and kv need none."""
    needs = {"last_word": data.passages, "piqa": data.piqa_rows, "agreement": data.transcripts}
    return [task for task in TASKS if task not in needs or needs[task]]


def _show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table("task", "context", "cache", "right", "rate", "95% interval", "agreed tokens, mean / median")
    for row in rows:
        agreed = (
            ""
            if row["agreed_mean"] is None
            else (f"{row['agreed_mean']:.1f} / {row['agreed_median']:g} of {row['agreed_limit']}")
        )
        table.add_row(
            row["task"],
            str(row["context_tokens"]),
            row["cache"],
            f"{row['right']}/{row['total']}",
            f"{row['rate']:.3f}",
            f"{row['low']:.3f} .. {row['high']:.3f}",
            agreed,
        )
    Console().print(table)
