"""Requests through their whole life: chunked prefill, prefix hits, decode, mixed batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deltastore_kernels import ops
from deltastore_kernels.basis import KeyBasis
from deltastore_kernels.context import Scoring
from deltastore_kernels.layout import RAW, Format, PageLayout
from sglang_deltastore.store import steps
from sglang_deltastore.store.pages import PageStore
from sglang_deltastore.store.size import StoreSize
from tests import budgets
from tests.kernels.attention_case import key_basis

HEADS, GROUP, PAGE_TOKENS, CONTEXT = 2, 3, 32, 256


class Life:
    """A raw page store, and beside it all queries, keys and values that went through one of its layers. `others`: the
    layouts of layers before that one."""

    def __init__(
        self,
        head_dim: int,
        scoring: Scoring,
        requests: int,
        key_basis: KeyBasis | None = None,
        sink_logits: torch.Tensor | None = None,
        value_dim: int | None = None,
        others: tuple[PageLayout, ...] = (),
    ) -> None:
        layout = PageLayout.holding(RAW, HEADS, head_dim, value_dim or head_dim, PAGE_TOKENS)
        size, bases = StoreSize((*others, layout), requests, CONTEXT), [*[None] * len(others), key_basis]
        self.store, self.layer = PageStore(size, 64, "cpu", ops.load(), bases), len(others)
        for pages in self.store.pages:
            pages.fill_(0xFF)
        self.head_dim, self.value_dim = head_dim, value_dim or head_dim
        self.scoring, self.sink_logits = scoring, sink_logits
        self.generator = torch.Generator().manual_seed(0)
        pages = torch.randperm(64, generator=self.generator) + 1
        slots = (pages[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).flatten()
        self.req_to_token = torch.zeros(requests + 1, CONTEXT, dtype=torch.int32)
        self.req_to_token[1:] = slots[: requests * CONTEXT].view(requests, CONTEXT)
        self.keys: list[list[torch.Tensor]] = [[] for _ in range(requests)]
        self.values: list[list[torch.Tensor]] = [[] for _ in range(requests)]

    def step(self, new_tokens: dict[int, int], decode: bool) -> None:
        """Run one step and check every output row against dense attention in float64."""
        rows = sorted(new_tokens)
        counts = torch.tensor([new_tokens[r] for r in rows])
        total = int(counts.sum())
        query = torch.randn(total, HEADS * GROUP, self.head_dim, generator=self.generator)
        # float16 values, so that raw pages lose nothing but what rotating back and forth costs
        key, value = (
            torch.randn(total, HEADS, dim, generator=self.generator).half().float()
            for dim in (self.head_dim, self.value_dim)
        )
        prefix = torch.tensor([len(self.keys[r]) for r in rows])
        requests = (self.store, self.req_to_token, torch.tensor(rows) + 1)
        if decode:
            plan = steps.plan_decode(*requests, prefix + 1)
        else:
            plan = steps.plan_extend(*requests, requests[2].tolist(), prefix, counts)
        attend = steps.decode if decode else steps.extend
        out = attend(self.store, self.layer, query, key, value, plan, self.scoring, self.sink_logits)
        token = 0
        for r in rows:
            for _ in range(new_tokens[r]):
                self.keys[r].append(key[token])
                self.values[r].append(value[token])
                stored = (torch.stack(side[r]) for side in (self.keys, self.values))
                expected = dense(query[token], *stored, self.scoring, self.sink_logits)
                assert (out[token] - expected).abs().max() < budgets.ATTENTION_RAW_STEPS, (r, len(self.keys[r]))
                token += 1


def dense(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scoring: Scoring, sink_logits: torch.Tensor | None
) -> torch.Tensor:
    """query [Hq, D] at the last of N positions, keys, values [N, H, D], sink_logits [Hq] -> [Hq, D], in float64."""
    keys, values = (x.double().repeat_interleave(GROUP, dim=1) for x in (keys, values))
    scores = torch.einsum("hd,nhd->hn", query.double(), keys) * scoring.scale
    if scoring.soft_cap:
        scores = scoring.soft_cap * torch.tanh(scores / scoring.soft_cap)
    if scoring.window_left is not None:
        scores[:, : max(0, len(keys) - 1 - scoring.window_left)] = float("-inf")
    if sink_logits is not None:  # one more column, as transformers' eager attention of gpt-oss has it
        weights = torch.cat((scores, sink_logits.double()[:, None]), 1).softmax(-1)[:, :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("hn,nhd->hd", weights, values).float()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("window_left", [None, 20])
@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
def test_life_of_requests(head_dim: int, window_left: int | None, soft_cap: float) -> None:
    live(Life(head_dim, Scoring(head_dim**-0.5, soft_cap, window_left), requests=3))


@pytest.mark.parametrize("window_left", [None, 20])
@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
@pytest.mark.parametrize("calibrated", [False, True])
def test_life_of_requests_beside_learned_sinks(calibrated: bool, window_left: int | None, soft_cap: float) -> None:
    """With calibration every stored key lacks a mean, and the sinks' term must not be weighed as if it did, too."""
    basis = key_basis(HEADS, 64, seed=3) if calibrated else None
    if basis and soft_cap:  # as Calibration.without_means has it
        basis = replace(basis, mean=torch.zeros_like(basis.mean))
    sink_logits = torch.linspace(-3, 6, HEADS * GROUP)
    live(Life(64, Scoring(0.125, soft_cap, window_left), requests=3, key_basis=basis, sink_logits=sink_logits))


@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(32, 32), (80, 80), (96, 96), (112, 112), (160, 160), (192, 128), (64, 96), (512, 512)]
)
@pytest.mark.parametrize("calibrated", [False, True])
def test_heads_of_any_size(key_dim: int, value_dim: int, calibrated: bool) -> None:
    basis = key_basis(HEADS, key_dim, seed=3) if calibrated else None
    live(Life(key_dim, Scoring(key_dim**-0.5, window_left=20), requests=3, key_basis=basis, value_dim=value_dim))


def test_layers_may_differ_in_heads_and_their_size() -> None:
    """As Gemma 4's: a step's plan is one for all of them."""
    others = (PageLayout.holding(RAW, 1, 512, 512, PAGE_TOKENS), PageLayout.holding(RAW, 5, 32, 32, PAGE_TOKENS))
    live(Life(80, Scoring(0.1), requests=3, others=others))


def live(life: Life) -> None:
    life.step({0: 37}, decode=False)  # cold prefill that ends inside a tile
    life.step({0: 64, 1: 5}, decode=False)  # its next chunk beside a cold prefill
    life.step({0: 1, 1: 1}, decode=True)  # decode at mixed lengths
    life.step({0: 1, 1: 30, 2: 48}, decode=False)  # mixed batch: a decode row, a chunk, a cold prefill
    for _ in range(18):  # across a tile's end
        life.step({0: 1, 1: 1, 2: 1}, decode=True)


def test_prefix_hit_reads_the_pages_of_another_request() -> None:
    life = Life(64, Scoring(0.125), requests=2)
    life.step({0: 70}, decode=False)
    # Request 1 hits request 0's first two pages, as SGLang's tree would arrange it.
    life.req_to_token[2, : 2 * PAGE_TOKENS] = life.req_to_token[1, : 2 * PAGE_TOKENS]
    life.keys[1], life.values[1] = (side[0][: 2 * PAGE_TOKENS] for side in (life.keys, life.values))
    before = life.store.pages[0].clone()
    life.step({1: 20}, decode=False)
    life.step({0: 1, 1: 1}, decode=True)
    shared = life.req_to_token[1, : 2 * PAGE_TOKENS : PAGE_TOKENS] // PAGE_TOKENS
    assert torch.equal(life.store.pages[0][shared], before[shared])


def test_packed_first_tokens_are_read_raw_and_written_by_the_first_alone() -> None:
    """A value of 1000 at the first position, which every query looks at: packed, or another's, it would be far off.
    Two sequences begin alike; the second one's differs, as another batch's rounding would make it, only more."""
    layout = PageLayout(Format(3, 2), HEADS, 64, PAGE_TOKENS)
    store = PageStore(StoreSize((layout,), 3, CONTEXT), 16, "cpu", ops.load())
    req_to_token = torch.zeros(4, CONTEXT, dtype=torch.int32)
    req_to_token[1:, : 2 * PAGE_TOKENS] = (PAGE_TOKENS + torch.arange(6 * PAGE_TOKENS)).view(3, -1)
    store.sink_table.hold({1: "a", 2: "a", 3: "b"})
    attention = Scoring(64**-0.5)

    def step(rows: list[int], prefix: int, new: int, first_value: float | None = None) -> torch.Tensor:
        """[rows] what a request's last query gets."""
        query, key, value = (torch.zeros(len(rows) * new, heads, 64) for heads in (GROUP * HEADS, HEADS, HEADS))
        query[..., 0] = 20.0
        if first_value is not None:
            key[::new, :, 0], value[::new] = 20.0, first_value
        where = (store, req_to_token, torch.tensor(rows))
        lengths = torch.tensor([prefix] * len(rows))
        if new == 1:
            out = steps.decode(store, 0, query, key, value, steps.plan_decode(*where, lengths + 1), attention)
        else:
            plan = steps.plan_extend(*where, rows, lengths, torch.full_like(lengths, new))
            out = steps.extend(store, 0, query, key, value, plan, attention)
        return out.view(len(rows), new, -1)[:, -1].mean(1)

    step([1], 0, 16, first_value=1000.0)
    step([2, 3], 0, 16, first_value=1100.0)
    for stored, new in ((16, 2), (18, 1)):
        read = step([1, 2, 3], stored, new) / torch.tensor([1000.0, 1000.0, 1100.0])
        torch.testing.assert_close(read, torch.ones(3), rtol=0, atol=budgets.ATTENTION_RAW_STEPS)


def test_a_frame_of_an_ended_request_is_not_read() -> None:
    life = Life(64, Scoring(0.125), requests=1)
    life.step({0: 31}, decode=False)
    life.keys[0], life.values[0] = [], []  # ends; its row and frame go to the next request
    life.store.frame_key_rot[0].fill_(float("nan"))
    life.step({0: 9}, decode=False)
    life.step({0: 1}, decode=True)


@pytest.mark.parametrize("lengths", [[0, 20], [20, 0], [0, 0, 3], [16, 0, 32], [0, 0]])
def test_requests_that_bring_nothing_cost_nothing(lengths: list[int]) -> None:
    """A batch may hold an empty prompt, and nothing but empty prompts."""
    life = Life(64, Scoring(0.125), requests=3)
    life.step(dict(enumerate(lengths)), decode=False)
    life.step({0: 1}, decode=True)
