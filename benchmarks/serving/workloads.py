"""Conversations as requests of token ids: recorded ones, a generated fleet, a production trace.

Teacher-forced: a prompt holds the recorded answers of earlier turns, whatever a server has answered, so every side gets
the same requests. Sessions take turns in a seeded random order, the turns of each in order; only `mooncake` comes in
its recorded order. (Round robin would be the worst case of a least-recently-used cache: no hit at any size below all.)

    airline   tau-bench: policy and tools in front of all sessions, an agent's calls and their results as turns
    tools     BFCL multi-turn: tool documents in front, shared by sessions with the same tools
    branches  OASST trees, every assistant message a request behind its path (siblings ask the same again), and
              MT-Bench-101 dialogues
    fleet     as sglang.bench_serving's generated-shared-prefix: random words, groups with one system prompt each
    mooncake  conversations of at least two requests; each 512-token block of the trace is 32 tokens, so that its
              126K-token contexts fit 8K
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from transformers import AutoTokenizer

from sglang_deltastore.fleet.traces import Trace

MODEL_CONTEXT_TOKENS = 8192
FIRST_WORD, LAST_WORD = 1000, 12000
"""Token ids to draw generated text from: plain words in the embedded models' vocabularies."""
MOONCAKE_SCALE = 16
_SESSIONS_PER_GROUP, _QUESTION_TOKENS, _ANSWER_TOKENS = 4, 64, 48

Message = dict[str, str]
Prompt = list[int]


class WorkloadError(ValueError):
    """A workload that cannot be built: what was given, what is wanted."""


@dataclass(frozen=True)
class Sizes:
    """What is kept of a workload. system_tokens: longest shared prompt in front, cut there; context_tokens: a session
    ends before the turn whose prompt and answer are longer."""

    sessions: int
    turns: int
    context_tokens: int
    system_tokens: int
    answer_tokens: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise WorkloadError(f"{name}={value}: must be at least 1")
        if self.context_tokens > MODEL_CONTEXT_TOKENS:
            raise WorkloadError(f"context_tokens={self.context_tokens}: the model has {MODEL_CONTEXT_TOKENS}")

    @property
    def prompt_tokens(self) -> int:
        """The longest prompt."""
        return self.context_tokens - self.answer_tokens


@dataclass(frozen=True)
class Request:
    """One turn: `prompt` holds all that came before it in its session."""

    session: int
    prompt: Prompt
    answer_tokens: int


class Texts:
    """Folders of texts, and the tokenizer of the model that reads them."""

    def __init__(self, data: Path, model: str | Path) -> None:
        self._data, self._model = Path(data), model

    @cached_property
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self._model)

    def path(self, pattern: str) -> Path:
        found = sorted(self._data.glob(pattern))
        if not found:
            raise WorkloadError(
                f"--data {self._data}: nothing there matches {pattern}; give the folder of the workloads"
            )
        return found[0]

    def json(self, pattern: str) -> Any:
        return json.loads(self.path(pattern).read_text())

    def rows(self, pattern: str) -> list[dict[str, Any]]:
        """One JSON object a line, zstd-compressed."""
        with zstandard.open(self.path(pattern), "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    def cut(self, text: str, tokens: int) -> str:
        """The text's first tokens."""
        return self._tokenizer.decode(self.tokens(text)[:tokens])

    def tokens(self, text: str) -> Prompt:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, messages: list[Message]) -> Prompt:
        """By the model's chat template, up to where the assistant begins."""
        return self.tokens(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def build(name: str, texts: Texts, sizes: Sizes, seed: int = 0) -> list[Request]:
    """The requests in the order of their arrival. Raises WorkloadError."""
    if name not in WORKLOADS:
        raise WorkloadError(f"--workload {name}: known are {', '.join(WORKLOADS)}")
    requests = WORKLOADS[name](texts, sizes, random.Random(seed))
    if len({request.session for request in requests}) < sizes.sessions:
        raise WorkloadError(
            f"{name}: fewer than {sizes.sessions} sessions have two turns that fit {sizes}; allow longer"
        )
    return requests


def _in_random_order(sessions: list[list[Prompt]], sizes: Sizes, pick: random.Random) -> list[Request]:
    """Sessions in random order, the turns of each in theirs."""
    order = [session for session, prompts in enumerate(sessions) for _ in prompts]
    pick.shuffle(order)
    turns = [iter(prompts) for prompts in sessions]
    return [Request(session, next(turns[session]), sizes.answer_tokens) for session in order]


def _fitting(prompts: Iterable[Prompt], sizes: Sizes) -> list[Prompt]:
    """The first turns, up to the first that is too long."""
    kept: list[Prompt] = []
    for prompt in prompts:
        if len(prompt) > sizes.prompt_tokens or len(kept) == sizes.turns:
            break
        kept.append(prompt)
    return kept


def _chosen(
    rows: list[Any], prompts_of: Callable[[Any], Iterable[Prompt]], count: int, sizes: Sizes, pick: random.Random
) -> list[list[Prompt]]:
    """Of rows in random order, the first `count` with two turns or more that fit."""
    sessions: list[list[Prompt]] = []
    for row in pick.sample(rows, len(rows)):
        if len(sessions) == count:
            break
        if len(prompts := _fitting(prompts_of(row), sizes)) >= 2:
            sessions.append(prompts)
    return sessions


def _airline(texts: Texts, sizes: Sizes, pick: random.Random) -> list[Request]:
    agent = texts.json("tau_bench/airline_policy_tools.json")
    whole = agent["policy"] + "\n" + json.dumps(agent["tools"], separators=(",", ":"))
    system = {"role": "system", "content": texts.cut(whole, sizes.system_tokens)}

    def prompts(row: dict[str, Any]) -> Iterator[Prompt]:
        messages = [{"role": message["role"], "content": message["content"] or ""} for message in row["messages"]]
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                yield texts.prompt([system, *messages[:index]])

    rows = texts.rows("tau_bench/airline_*trajectories.jsonl.zst")
    return _in_random_order(_chosen(rows, prompts, sizes.sessions, sizes, pick), sizes, pick)


def _tools(texts: Texts, sizes: Sizes, pick: random.Random) -> list[Request]:
    documents = texts.json("bfcl/function_docs.json")
    instructions = texts.path("bfcl/system_prompt.txt").read_text()

    def prompts(row: dict[str, Any]) -> Iterator[Prompt]:
        functions = [
            function
            for tools in row["involved_classes"]
            for function in documents[tools]
            if function["name"] not in row["excluded_function"]
        ]
        whole = instructions.replace("{functions}", json.dumps(functions, separators=(",", ":")))
        messages = [{"role": "system", "content": texts.cut(whole, sizes.system_tokens)}]
        for asked, calls in zip(row["turns"], row["ground_truth"], strict=True):
            messages += asked
            yield texts.prompt(messages)
            messages.append({"role": "assistant", "content": f"[{', '.join(calls)}]"})

    rows = texts.rows("bfcl/multi_turn.jsonl.zst")
    return _in_random_order(_chosen(rows, prompts, sizes.sessions, sizes, pick), sizes, pick)


def _branches(texts: Texts, sizes: Sizes, pick: random.Random) -> list[Request]:
    def below(message: dict[str, Any], path: list[Message]) -> Iterator[Prompt]:
        if message["role"] == "assistant":
            yield texts.prompt(path)
        longer = [*path, {"role": message["role"], "content": message["text"]}]
        for reply in message["replies"]:
            yield from below(reply, longer)

    def dialogue(row: dict[str, Any]) -> Iterator[Prompt]:
        messages: list[Message] = []
        for turn in row["history"]:
            messages.append({"role": "user", "content": turn["user"]})
            yield texts.prompt(messages)
            messages.append({"role": "assistant", "content": turn["bot"]})

    trees, dialogues = texts.rows("chat/oasst_trees.jsonl.zst"), texts.rows("chat/mt_bench_101.jsonl.zst")
    few = sizes.sessions // 3
    sessions = _chosen(trees, lambda row: below(row["tree"], []), sizes.sessions - few, sizes, pick)
    sessions += _chosen(dialogues, dialogue, few, sizes, pick)
    return _in_random_order(sessions, sizes, pick)


def _fleet(_texts: Texts, sizes: Sizes, pick: random.Random) -> list[Request]:
    groups = [words(sizes.system_tokens, pick) for _ in range(-(-sizes.sessions // _SESSIONS_PER_GROUP))]

    def prompts(prompt: Prompt) -> Iterator[Prompt]:
        while True:
            prompt = prompt + words(_QUESTION_TOKENS, pick)
            yield prompt
            prompt = prompt + words(_ANSWER_TOKENS, pick)

    sessions = [_fitting(prompts(groups[number // _SESSIONS_PER_GROUP]), sizes) for number in range(sizes.sessions)]
    return _in_random_order(sessions, sizes, pick)


def _mooncake(texts: Texts, sizes: Sizes, pick: random.Random) -> list[Request]:
    trace = Trace(texts.path("mooncake/conversation_trace*.jsonl*"))
    block_tokens = trace.block_tokens // MOONCAKE_SCALE
    conversations: dict[int, list[tuple[int, Prompt]]] = {}
    conversation_of: dict[int, int] = {}  # the last block of a request -> its conversation
    for number, request in enumerate(trace):
        ids = np.frombuffer(request.blocks, "<i8")
        blocks = ids[ids >= 0].tolist()  # a partial block is negative: the next request has it under another id
        tail_tokens = (request.prompt_tokens - len(blocks) * trace.block_tokens) // MOONCAKE_SCALE
        if len(blocks) * block_tokens + tail_tokens > sizes.prompt_tokens or len(blocks) < 2:
            continue
        conversation = next((conversation_of[block] for block in reversed(blocks) if block in conversation_of), number)
        conversation_of[blocks[-1]] = conversation
        prompt = [word for block in blocks for word in words(block_tokens, random.Random(block))]
        prompt += words(tail_tokens, random.Random(-1 - number))
        conversations.setdefault(conversation, []).append((number, prompt))
    several = [turns[: sizes.turns] for turns in conversations.values() if len(turns) >= 2]
    chosen = pick.sample(several, min(sizes.sessions, len(several)))
    arrivals = sorted((number, session, prompt) for session, turns in enumerate(chosen) for number, prompt in turns)
    return [Request(session, prompt, sizes.answer_tokens) for _, session, prompt in arrivals]


def words(count: int, pick: random.Random) -> Prompt:
    """Random plain words."""
    return [pick.randrange(FIRST_WORD, LAST_WORD) for _ in range(count)]


WORKLOADS: dict[str, Callable[[Texts, Sizes, random.Random], list[Request]]] = {
    "airline": _airline, "tools": _tools, "branches": _branches, "fleet": _fleet, "mooncake": _mooncake,
}  # fmt: skip
