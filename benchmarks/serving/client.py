"""Requests to SGLang's native endpoint as a client would send them: streamed, every answer checked."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import requests
from prometheus_client.parser import text_string_to_metric_families

from .workloads import Prompt

TIMEOUT_S = 900


class WrongAnswer(RuntimeError):
    """An answer that is not what was asked for."""


@dataclass(frozen=True)
class Answer:
    """One request's outcome, as its client saw it. ttft_ms: from sending it to its first token."""

    prompt_tokens: int
    cached_tokens: int
    output_ids: list[int]
    ttft_ms: float
    total_ms: float

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


def body(prompt: Prompt, answer_tokens: int, **more: Any) -> dict[str, Any]:
    """A greedy request for exactly `answer_tokens`."""
    sampling = {"temperature": 0, "max_new_tokens": answer_tokens, "ignore_eos": True}
    return {"input_ids": prompt, "sampling_params": sampling, "stream": True, **more}


def chunks(response: requests.Response) -> Iterator[dict[str, Any]]:
    """The events of a streamed answer; each has all tokens so far."""
    for line in response.iter_lines():
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


def ask(url: str, prompt: Prompt, answer_tokens: int, **more: Any) -> Answer:
    """Stream one answer. Raises WrongAnswer, or requests' errors."""
    begin = time.perf_counter()
    ttft_ms, last = 0.0, {}
    sent = body(prompt, answer_tokens, **more)
    with requests.post(url + "/generate", json=sent, stream=True, timeout=TIMEOUT_S) as response:
        response.raise_for_status()
        for chunk in chunks(response):
            ttft_ms = ttft_ms or (time.perf_counter() - begin) * 1000
            last = chunk
    total_ms = (time.perf_counter() - begin) * 1000
    meta = last.get("meta_info", {})
    found = (meta.get("prompt_tokens"), meta.get("completion_tokens"), len(last.get("output_ids", [])))
    wanted = (len(prompt), answer_tokens, answer_tokens)
    if found != wanted:
        raise WrongAnswer(f"(prompt, completion, output) tokens are {found}, must be {wanted}: {last}")
    if not 0 <= meta["cached_tokens"] < len(prompt):
        raise WrongAnswer(f"cached_tokens is {meta['cached_tokens']} of {len(prompt)}")
    return Answer(len(prompt), meta["cached_tokens"], last["output_ids"], ttft_ms, total_ms)


def flush(url: str, timeout_s: int = 60) -> None:
    """Empty the cache; waits until nothing runs."""
    requests.post(f"{url}/flush_cache?timeout={timeout_s}", timeout=timeout_s + 30).raise_for_status()


@dataclass(frozen=True)
class Counters:
    """What a server has counted since its start."""

    computed_tokens: float
    evicted_tokens: float
    retracted_requests: float

    @classmethod
    def read(cls, url: str) -> Counters:
        response = requests.get(url + "/metrics", timeout=60)
        response.raise_for_status()
        sums: dict[tuple[str, str], float] = {}
        for family in text_string_to_metric_families(response.text):
            for sample in family.samples:
                key = (sample.name, sample.labels.get("mode", ""))
                sums[key] = sums.get(key, 0.0) + sample.value
        return cls(
            computed_tokens=sums.get(("sglang:realtime_tokens_total", "prefill_compute"), 0.0),
            evicted_tokens=sums.get(("sglang:evicted_tokens_total", ""), 0.0),
            retracted_requests=sums.get(("sglang:num_retracted_requests_total", ""), 0.0),
        )

    def since(self, before: Counters) -> Counters:
        return Counters(*(now - then for now, then in zip(vars(self).values(), vars(before).values(), strict=True)))
