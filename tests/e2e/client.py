"""Requests to SGLang's native endpoint, and texts to send."""

from __future__ import annotations

import random
from typing import Any

import requests

from sglang_deltastore.host.server_process import Server

ANSWER_TIMEOUT_S = 600


def post(server: Server, **body: Any) -> requests.Response:
    return requests.post(server.url + "/generate", json=body, timeout=ANSWER_TIMEOUT_S)


def generate(server: Server, input_ids: list[int], tokens: int = 1, **body: Any) -> dict[str, Any]:
    """Greedy answer of exactly `tokens` tokens; raises for an HTTP error."""
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    response = post(server, input_ids=input_ids, sampling_params=sampling, **body)
    response.raise_for_status()
    return response.json()


def score(server: Server, input_ids: list[int], from_token: int) -> list[float]:
    """Log-probabilities of input_ids[from_token:], each given all tokens before it."""
    answer = generate(server, input_ids, return_logprob=True, logprob_start_len=from_token - 1)
    return [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]


def flush(server: Server) -> None:
    requests.post(server.url + "/flush_cache?timeout=60", timeout=90).raise_for_status()


def prompt(tokens: int, seed: int) -> list[int]:
    """Ids of words that follow one another with some sense: short sentences from a small grammar."""
    pick = random.Random(seed)
    return [pick.randrange(1000, 12000) if i % 3 else pick.choice([30, 28, 253, 284, 282]) for i in range(tokens)]
