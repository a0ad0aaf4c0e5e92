"""What compression costs on what is served: a share of the requests is run once more with raw attention, and compared.

Of each token of a sampled answer the log-probabilities of the TOP most likely tokens are kept as they were served,
before the request's own penalties, biases and grammar change them, on the device. While nothing runs the whole sequence
goes through the model again, every token attending to raw keys and values, and both distributions are compared over
those TOP tokens and all the rest together: KL(raw || served), which what is left apart in the rest can only lower.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

TOP = 20
"""Most likely tokens, by what was served; all others are one bucket."""

COST_SHARE = 1 / 100
"""Of all time since the last run began, at most this part is spent in runs: one that takes a second is followed by 99
seconds without."""

MOST_WAITING = 16
"""Answers that have not been run again yet; one more, and the oldest is left out. Each token of theirs keeps 1 KiB of
the device's memory at most, in small tensors."""

#: a context's tokens, and the share of its prompt that was a hit: upper bounds of what is told apart
CONTEXT_BOUNDS = {"1K": 1 << 10, "4K": 1 << 12, "16K": 1 << 14, "more": math.inf}
HIT_BOUNDS = {"0%": 0.0, "50%": 0.5, "90%": 0.9, "100%": math.inf}


def is_sampled(request_id: str, share: float) -> bool:
    """The same answer wherever it is asked, and again after a retraction. share: of all requests, 0 .. 1."""
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def most_likely(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V] -> of the TOP most likely tokens log-probabilities [N, TOP] float32 and ids [N, TOP] int64."""
    logits = logits.float()
    top, ids = logits.topk(min(TOP, logits.shape[-1]), -1)
    return top - logits.logsumexp(-1, keepdim=True), ids


def compared(
    raw_logits: torch.Tensor, served: torch.Tensor, served_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """raw_logits [N, V]; served [N, TOP] log-probabilities of served_ids [N, TOP], the most likely first.

    Returns of each token KL(raw || served) [N] in nats, and whether both like the same token most [N] bool.
    """
    raw_logits = raw_logits.float()
    raw = raw_logits.gather(1, served_ids) - raw_logits.logsumexp(-1, keepdim=True)
    raw_all, served_all = _with_rest(raw), _with_rest(served)
    kl = (raw_all.exp() * (raw_all - served_all)).sum(-1).clamp_min(0)
    return kl, raw_logits.argmax(-1) == served_ids[:, 0]


def _with_rest(logprobs: torch.Tensor) -> torch.Tensor:
    """[N, TOP] -> [N, TOP + 1] float64: behind them what is left. Rounding of float32 leaves less than 1e-7 unsure."""
    logprobs = logprobs.double()
    rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp_min(1e-7)
    return torch.cat((logprobs, rest.log()), -1)


@dataclass(frozen=True)
class Answer:
    """A sampled request that has ended. token_ids: prompt and answer; served: by place in token_ids, of answered tokens
    log-probabilities [TOP] and ids [TOP]; adapter: whose, if any."""

    token_ids: list[int]
    prompt_tokens: int
    hit_tokens: int
    served: dict[int, tuple[torch.Tensor, torch.Tensor]]
    adapter: str | None = None

    @property
    def by_context(self) -> str:
        return _below(CONTEXT_BOUNDS, len(self.token_ids))

    @property
    def by_hit(self) -> str:
        return _below(HIT_BOUNDS, self.hit_tokens / self.prompt_tokens)


def _below(bounds: dict[str, float], value: float) -> str:
    return next(name for name, bound in bounds.items() if value <= bound)


@dataclass
class Tally:
    """Of compared tokens: how many, the sum of their KL in nats, how many agree on the most likely token, the worst."""

    tokens: int = 0
    kl_nats: float = 0.0
    agreed: int = 0
    kl_worst: float = 0.0

    @property
    def kl_mean(self) -> float:
        return self.kl_nats / self.tokens if self.tokens else 0.0

    @property
    def top1_agreement(self) -> float:
        return self.agreed / self.tokens if self.tokens else 1.0

    def add(self, kl: torch.Tensor, agrees: torch.Tensor) -> None:
        self.tokens += len(kl)
        self.kl_nats += float(kl.sum())
        self.agreed += int(agrees.sum())
        self.kl_worst = max(self.kl_worst, float(kl.max()))


def _tallies(bounds: Iterable[str]) -> dict[str, Tally]:
    return {name: Tally() for name in bounds}


@dataclass
class CanaryCounts:
    """Since the server's start; see stats.StoreStats."""

    sequences: int = 0
    too_long: int = 0
    not_comparable: int = 0
    overtaken: int = 0
    seconds: float = 0.0
    all: Tally = field(default_factory=Tally)
    by_context: dict[str, Tally] = field(default_factory=lambda: _tallies(CONTEXT_BOUNDS))
    by_hit: dict[str, Tally] = field(default_factory=lambda: _tallies(HIT_BOUNDS))


RawLogits = Callable[[list[int], int, str | None], Iterator[torch.Tensor]]
"""(token_ids, first, adapter) -> logits behind token_ids[first:], some [N, V] at a time, all tokens attending to raw
ones; none where the adapter has gone."""


class Canary:
    """share: of requests; most_tokens: of a sequence that is run again; listeners are called with an answer and the KL
    of each of its tokens."""

    def __init__(
        self, share: float, most_tokens: int, raw_logits: RawLogits, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.share, self.most_tokens = share, most_tokens
        self.counts = CanaryCounts()
        self.listeners: list[Callable[[Answer, list[float]], None]] = []
        self._raw_logits, self._clock = raw_logits, clock
        self._not_before_s = -math.inf
        #: by request id, of sampled requests that run: what they were served so far
        self._running: dict[str, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {}
        self._waiting: deque[Answer] = deque()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def begin(self, request_id: str, prompt_tokens: int, comparable: bool) -> None:
        """A request runs next, for the first time or again. comparable: its tokens alone say what it attends to."""
        if request_id in self._running or not is_sampled(request_id, self.share):
            return
        if not comparable:
            self.counts.not_comparable += 1
        elif prompt_tokens >= self.most_tokens:
            self.counts.too_long += 1
        else:
            self._running[request_id] = {}

    def serve(self, request_ids: list[str], logits: torch.Tensor, places: Callable[[], list[int]]) -> None:
        """A step's logits [B, V] before anything is sampled from them. places: of the tokens that are, in their
        sequences [B]."""
        rows = [row for row, request_id in enumerate(request_ids) if request_id in self._running]
        if not rows:
            return
        logprobs, ids = most_likely(torch.stack([logits[row] for row in rows]))
        at = places()
        for index, row in enumerate(rows):
            self._running[request_ids[row]][at[row]] = logprobs[index], ids[index]

    def end(
        self,
        request_id: str,
        token_ids: Callable[[], list[int]],
        prompt_tokens: int,
        hit_tokens: int,
        adapter: str | None = None,
    ) -> None:
        """A request has ended, sampled or not."""
        served = self._running.pop(request_id, None)
        if served is None:
            return
        tokens = token_ids()
        served = {place: step for place, step in served.items() if prompt_tokens <= place < len(tokens)}
        if len(tokens) > self.most_tokens:
            self.counts.too_long += 1
        elif served:
            self._waiting.append(Answer(tokens, prompt_tokens, hit_tokens, served, adapter))
            if len(self._waiting) > MOST_WAITING:
                self._waiting.popleft()
                self.counts.overtaken += 1

    def forget(self) -> None:
        """What waits was served by weights that may have changed."""
        self.counts.overtaken += len(self._waiting)
        self._waiting.clear()

    def run_next(self) -> None:
        """While nothing runs: one answer's sequence once more, if one waits and the time is there."""
        self._running.clear()  # retracted ones that were given up never end
        if not self._waiting or (began := self._clock()) < self._not_before_s:
            return
        answer = self._waiting.popleft()
        try:
            self._compare(answer)
        finally:
            taken_s = self._clock() - began
            self.counts.seconds += taken_s
            self._not_before_s = began + taken_s / COST_SHARE

    def _compare(self, answer: Answer) -> None:
        # A token is predicted by the states of the one before it.
        first = answer.prompt_tokens - 1
        places = torch.tensor(sorted(answer.served))
        served, ids = (torch.stack([answer.served[int(place)][side] for place in places]) for side in (0, 1))
        found, begin = [], first + 1
        for logits in self._raw_logits(answer.token_ids[:-1], first, answer.adapter):
            rows = (places >= begin) & (places < begin + len(logits))
            here = (places[rows] - begin).to(logits.device)
            on_device = rows.to(served.device)
            found.append(compared(logits[here], served[on_device], ids[on_device]))
            begin += len(logits)
        if not found:
            self.counts.overtaken += 1
            return
        kl, agrees = (torch.cat(side).cpu() for side in zip(*found, strict=True))
        self.counts.sequences += 1
        for tally in (
            self.counts.all, self.counts.by_context[answer.by_context], self.counts.by_hit[answer.by_hit]
        ):  # fmt: skip
            tally.add(kl, agrees)
        for listener in self.listeners:
            listener(answer, kl.tolist())
