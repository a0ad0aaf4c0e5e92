"""The canary without a server: what it compares, what it adds up, whom it samples, and when it runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_deltastore.observe import canary
from sglang_deltastore.observe.canary import TOP, Answer, Canary, compared, is_sampled, most_likely
from sglang_deltastore.observe.series import CanaryHistogram
from sglang_deltastore.seam.live_quality import CanaryOfRequests, most_tokens

VOCABULARY = 50


def logits(tokens: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(tokens, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * spread


def kl_of(raw: torch.Tensor, served: torch.Tensor) -> float:
    """One token's, by the definition: the most likely tokens of `served` [V], and one bucket for all others."""
    p, q = (each.double().softmax(-1).tolist() for each in (raw, served))
    likely = sorted(range(VOCABULARY), key=q.__getitem__)[-TOP:]
    rest = [token for token in range(VOCABULARY) if token not in likely]
    buckets = [*([token] for token in likely), rest]
    return sum(
        sum(p[t] for t in bucket) * math.log(sum(p[t] for t in bucket) / sum(q[t] for t in bucket))
        for bucket in buckets
    )


def test_the_comparison_is_the_definition() -> None:
    raw, served = logits(40), logits(40) + logits(40, seed=1, spread=0.3)
    kl, agrees = compared(raw, *most_likely(served))
    wanted = torch.tensor([kl_of(*pair) for pair in zip(raw, served, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(kl, wanted, rtol=1e-5, atol=1e-6)
    assert agrees.tolist() == (raw.argmax(-1) == served.argmax(-1)).tolist()
    assert 0 < int(agrees.sum()) < 40


def test_the_buckets_lose_little_and_never_add() -> None:
    raw, served = logits(40), logits(40) + logits(40, seed=1, spread=0.3)
    kl, _ = compared(raw, *most_likely(served))
    p, q = (each.double().log_softmax(-1) for each in (raw, served))
    whole = (p.exp() * (p - q)).sum(-1)
    assert (kl <= whole + 1e-6).all()
    assert kl.sum() > 0.9 * whole.sum()


@pytest.mark.parametrize("sure", [1.0, 30.0, 200.0])
def test_the_same_distribution_is_no_difference_however_sure_it_is(sure: float) -> None:
    same = logits(20) * sure
    kl, agrees = compared(same, *most_likely(same))
    assert kl.max() < 1e-6 and agrees.all()
    # What float32 leaves of the rest is 1e-7 or nothing, by chance: no difference either.
    kl, _ = compared(same * (1 + 1e-6), *most_likely(same))
    assert kl.max() < 1e-6


def test_what_float32_leaves_of_the_rest_is_no_difference() -> None:
    likely = torch.full((1, TOP), -math.log(TOP), dtype=torch.float64)
    nothing, dust = (canary._with_rest(likely + more) for more in (1e-9, -1e-7))
    assert (dust.exp() * (dust - nothing)).sum().abs() < 2e-7


def test_what_is_sampled_follows_from_the_request_alone() -> None:
    ids = [f"request {number}" for number in range(4000)]
    for share in (0.0, 0.01, 0.3, 1.0):
        found = [each for each in ids if is_sampled(each, share)]
        assert found == [each for each in ids if is_sampled(each, share)]
        assert len(found) / len(ids) == pytest.approx(share, abs=4 * math.sqrt(max(share * (1 - share), 1e-9) / 4000))
    assert {each for each in ids if is_sampled(each, 0.01)} < {each for each in ids if is_sampled(each, 0.3)}


GONE = "an adapter that was unloaded"


class Model:
    """Answers as a server would: `served` and `raw` logits of every place of a sequence; and a clock for what runs."""

    def __init__(self, run_s: float = 1.0) -> None:
        self.now, self.run_s, self.runs = 100.0, run_s, [0.0][:0]
        self.raw, self.served = logits(200), logits(200) + logits(200, seed=1, spread=0.2)

    def raw_logits(self, token_ids: list[int], first: int, adapter: str | None = None) -> Iterator[torch.Tensor]:
        self.runs.append(self.now)
        self.now += self.run_s
        if adapter == GONE:
            return
        for begin in range(first, len(token_ids), 7):
            yield self.raw[begin : min(begin + 7, len(token_ids))]

    def canary(self, share: float = 1.0, longest: int = 150) -> Canary:
        return Canary(share, longest, self.raw_logits, clock=lambda: self.now)

    def serve(
        self, canary: Canary, name: str = "a", prompt_tokens: int = 30, answer_tokens: int = 20, hit_tokens: int = 0
    ) -> None:
        """A whole request, in a batch with another that nobody has begun."""
        canary.begin(name, prompt_tokens, comparable=True)
        for place in range(prompt_tokens, prompt_tokens + answer_tokens + 1):  # overlapping, SGLang runs a step too far
            behind = self.served[place - 1]
            canary.serve(["other", name], torch.stack([behind * 0, behind]), lambda place=place: [5, place])
        canary.end(name, lambda: list(range(prompt_tokens + answer_tokens)), prompt_tokens, hit_tokens)


def test_each_answered_token_is_compared_with_the_same_token() -> None:
    model = Model()
    watched, heard = model.canary(), []
    watched.listeners.append(lambda answer, kl: heard.append((answer.by_context, answer.by_hit, kl)))
    model.serve(watched, hit_tokens=16)
    assert watched.waiting == 1
    watched.run_next()
    behind = slice(29, 49)  # the last token of the prompt predicts the first of the answer
    kl, agrees = compared(model.raw[behind], *most_likely(model.served[behind]))
    counts = watched.counts
    assert (counts.sequences, counts.all.tokens, watched.waiting) == (1, 20, 0)
    assert counts.all.kl_mean == pytest.approx(float(kl.mean())) and counts.all.kl_worst == float(kl.max())
    assert counts.all.top1_agreement == float(agrees.double().mean())
    assert heard == [("1K", "90%", kl.tolist())]
    assert counts.by_hit["90%"] == counts.by_context["1K"] == counts.all
    assert counts.seconds == 1.0


def test_parts_add_up_to_the_whole() -> None:
    model = Model(run_s=0)
    watched = model.canary()
    for name, hit_tokens in (("a", 0), ("b", 15), ("c", 16), ("d", 29)):
        model.serve(watched, name, hit_tokens=hit_tokens)
        watched.run_next()
    counts = watched.counts
    assert [part.tokens for part in counts.by_hit.values()] == [20, 20, 20, 20]
    assert sum(part.kl_nats for part in counts.by_hit.values()) == pytest.approx(counts.all.kl_nats)
    assert counts.all.tokens == counts.by_context["1K"].tokens == 80


def test_contexts_are_told_apart_by_their_tokens() -> None:
    def name(tokens: int) -> str:
        return Answer([0] * tokens, 1, 0, {}).by_context

    assert [name(tokens) for tokens in (1024, 1025, 4096, 4097, 16384, 16385)] == [
        "1K",
        "4K",
        "4K",
        "16K",
        "16K",
        "more",
    ]


def test_runs_take_a_hundredth_of_the_time_and_the_first_comes_at_once() -> None:
    model = Model(run_s=2.0)
    watched, began = model.canary(), model.now
    for number in range(canary.MOST_WAITING):
        model.serve(watched, str(number))
    while watched.waiting > canary.MOST_WAITING - 9:
        watched.run_next()
        model.now += 0.5
    assert model.runs[0] == began
    gaps = [later - earlier for earlier, later in pairwise(model.runs)]
    assert all(200 <= gap <= 200.5 for gap in gaps)
    assert watched.counts.seconds <= (model.now - began) / 100 + 2.0


def test_what_cannot_be_compared_is_counted() -> None:
    model = Model()
    watched = model.canary(longest=60)
    watched.begin("image", 30, comparable=False)
    watched.begin("long", 60, comparable=True)
    model.serve(watched, "grown", prompt_tokens=50, answer_tokens=20)
    model.serve(watched, "at the bound", prompt_tokens=50, answer_tokens=10)
    assert (watched.counts.not_comparable, watched.counts.too_long, watched.waiting) == (1, 2, 1)
    for number in range(canary.MOST_WAITING + 2):
        model.serve(watched, str(number))
    assert (watched.waiting, watched.counts.overtaken) == (canary.MOST_WAITING, 3)
    watched.forget()
    assert (watched.waiting, watched.counts.overtaken) == (0, canary.MOST_WAITING + 3)
    watched.run_next()
    assert model.runs == []


def test_nothing_is_kept_of_who_is_not_sampled() -> None:
    model = Model()
    watched = model.canary(share=0.0)
    model.serve(watched)
    assert (watched.waiting, watched._running) == (0, {})

    def dear() -> list[int]:
        raise AssertionError("a step without sampled requests has cost something")

    watched.serve(["a", "b"], torch.zeros(2, VOCABULARY), dear)


def test_a_request_that_begins_again_keeps_what_it_was_served() -> None:
    """Retracted, and then admitted with its answer so far as a part of its prompt."""
    model = Model()
    watched = model.canary()
    for begin, end in ((30, 40), (40, 51)):
        watched.begin("a", 30, comparable=True)
        for place in range(begin, end):
            watched.serve(["a"], model.served[place - 1 : place], lambda place=place: [place])
    watched.end("a", lambda: list(range(50)), 30, 0)
    watched.run_next()
    assert watched.counts.all.tokens == 20


def test_an_answer_without_tokens_is_none() -> None:
    """Given up while its first token was on its way."""
    model = Model()
    watched = model.canary()
    watched.begin("a", 30, comparable=True)
    watched.serve(["a"], model.served[29:30], lambda: [30])
    watched.end("a", lambda: list(range(30)), 30, 0)
    assert watched.waiting == 0


def test_a_request_that_never_ends_is_forgotten_when_nothing_runs() -> None:
    model = Model()
    watched = model.canary()
    watched.begin("given up", 30, comparable=True)
    model.serve(watched)
    watched.run_next()
    assert watched._running == {}


def test_a_run_that_fails_costs_its_time_and_counts_nothing() -> None:
    model = Model()

    def fails(_token_ids: list[int], _first: int, _adapter: str | None) -> Iterator[torch.Tensor]:
        model.now += 3.0
        raise RuntimeError("no memory")
        yield

    watched = Canary(1.0, 150, fails, clock=lambda: model.now)
    model.serve(watched)
    with pytest.raises(RuntimeError):
        watched.run_next()
    assert (watched.counts.sequences, watched.counts.seconds, watched.waiting) == (0, 3.0, 0)


def test_an_answer_whose_adapter_has_gone_is_left_out() -> None:
    model = Model()
    watched = model.canary()
    watched.begin("a", 30, True)
    watched.serve(["a"], model.served[29:30], lambda: [30])
    watched.end("a", lambda: list(range(31)), 30, 0, adapter=GONE)
    watched.run_next()
    assert (watched.counts.sequences, watched.counts.overtaken, watched.waiting) == (0, 1, 0)


def request(**changed: Any) -> Any:
    fields: dict[str, Any] = {
        "rid": "a", "origin_input_ids": list(range(30)), "output_ids": [7, 8], "cached_tokens": 16,
        "lora_id": "an adapter", "multimodal_inputs": None, "input_embeds": None,
        "positional_embed_overrides": None, "token_type_ids": None,
        "finished": lambda: True,
    }  # fmt: skip
    return SimpleNamespace(**{**fields, **changed})


def test_requests_are_told_by_what_sglang_knows_of_them() -> None:
    model = Model()
    watched = model.canary()
    told = CanaryOfRequests(watched)
    for place in (30, 31):
        told.begin([request(), request(rid="HEALTH_CHECK_1")])
        watched.serve(["a"], model.served[place - 1 : place], lambda place=place: [place])
    assert list(watched._running) == ["a"]
    told.end(request(finished=lambda: False))
    assert watched.waiting == 0, "it was retracted"
    told.end(request())
    (answer,) = watched._waiting
    assert (answer.token_ids, answer.prompt_tokens, answer.hit_tokens) == ([*range(30), 7, 8], 30, 16)
    assert answer.adapter == "an adapter"
    assert sorted(answer.served) == [30, 31]
    for field in ("multimodal_inputs", "input_embeds", "positional_embed_overrides", "token_type_ids"):
        told.begin([request(rid=field, **{field: object()})])
    assert (watched.counts.not_comparable, watched._running) == (4, {})


@pytest.mark.parametrize(("chunk", "longest"), [(None, 8192), (2048, 2048), (16384, 8192)])
def test_a_sequence_is_as_long_as_a_pass_of_the_server_may_be(chunk: int | None, longest: int) -> None:
    scheduler = SimpleNamespace(model_config=SimpleNamespace(context_len=8192), chunked_prefill_size=chunk)
    assert most_tokens(scheduler) == longest


def test_the_histogram_has_every_token_under_its_labels() -> None:
    from prometheus_client import CollectorRegistry, Histogram

    registry = CollectorRegistry()
    listens = CanaryHistogram(lambda *args, **named: Histogram(*args, registry=registry, **named), {"tier": "k4v2"})
    listens(Answer([0] * 2000, 1000, 960, {}), [0.5, 0.002, 0.002])
    labels = {"tier": "k4v2", "context": "4K", "hit": "100%"}
    values = {
        ending: registry.get_sample_value(f"deltastore:canary_kl_nats_{ending}", labels) for ending in ("count", "sum")
    }
    assert values == {"count": 3, "sum": pytest.approx(0.504)}
    assert registry.get_sample_value("deltastore:canary_kl_nats_bucket", {**labels, "le": "0.003"}) == 2
