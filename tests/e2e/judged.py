"""A server of a tiny random model, held against Hugging Face's run of the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from sglang_deltastore.host.server_process import Server
from tests.e2e.client import flush, generate

ANSWER_TOKENS = 40


def prompt(tokens: int, seed: int = 0) -> list[int]:
    """Ids without sense, of a vocabulary of 4,096."""
    return [(37 * i * i + (11 + seed) * i) % 4000 + 10 for i in range(tokens)]


@dataclass(frozen=True)
class Judged:
    """mean_nats, largest_nats: what its log-probabilities may be off; largest None: a single token may be off more."""

    server: Server
    model: PreTrainedModel
    mean_nats: float
    largest_nats: float | None = None

    @torch.inference_mode()
    def check(self, ours: list[float], ids: list[int]) -> None:
        """The server's log-probabilities of the last of ids, each given those before it."""
        theirs = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        theirs = theirs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])][-len(ours) :]
        off = (torch.tensor(ours) - theirs).abs()
        assert off.mean() < self.mean_nats
        if self.largest_nats is not None:
            assert off.max() < self.largest_nats

    def check_answer(self, ids: list[int], answer: Mapping[str, Any]) -> None:
        """Of a request for log-probabilities: what was decoded after ids."""
        decoded = answer["meta_info"]["output_token_logprobs"]
        self.check([entry[0] for entry in decoded], [*ids, *(entry[1] for entry in decoded)])

    def answer(self, ids: list[int], tokens: int = ANSWER_TOKENS, **body: Any) -> dict[str, Any]:
        return generate(self.server, ids, tokens, return_logprob=True, **body)

    def check_hit(self, ids: list[int], asked_before: int, cached_tokens: int) -> None:
        """The first asked_before of ids are cached; the rest, and what is decoded after it, is computed behind the
        cached_tokens that SGLang finds of them."""
        flush(self.server)
        generate(self.server, ids[:asked_before])
        answer = self.answer(ids, logprob_start_len=cached_tokens)
        assert answer["meta_info"]["cached_tokens"] == cached_tokens
        self.check([entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]], ids)
        self.check_answer(ids, answer)


def check_that_nothing_is_lost(server: Server, encoded_tokens: int) -> None:
    """After so many tokens at least were stored, and evicted in part."""
    stats = server.settled_stats()
    assert stats.encoded_tokens > encoded_tokens
    assert (stats.census_current, stats.accounting_errors, stats.untracked_tokens) == (True, (), 0)
    assert stats.observation_errors == 0
    flush(server)
    stats = server.settled_stats()
    assert (stats.pages_free, stats.window_pages_free) == (stats.pages_total, stats.window_pages_total)
    assert stats.frames_free == stats.frames_total
