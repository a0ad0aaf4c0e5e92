"""Steps over drafts: what they attend to, and that pages never hold what was not accepted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltastore_kernels import ops
from deltastore_kernels.context import Scoring
from deltastore_kernels.layout import RAW, TILE_TOKENS, Format, PageLayout
from sglang_deltastore.store import steps
from sglang_deltastore.store.pages import PageStore
from sglang_deltastore.store.size import StoreSize
from tests import budgets

HEADS, GROUP, DIM, PAGE_TOKENS, PAGES = 2, 3, 32, 32, 8
REQUESTS, DRAFTS = 3, 4
ROWS = torch.tensor([2, 3, 1])


class Server:
    """One layer of a store, and the requests of ROWS on their way through it."""

    def __init__(self, layout: PageLayout, draft_tokens: int, backend: str = "reference") -> None:
        size = StoreSize((layout,), REQUESTS, 0, draft_tokens=draft_tokens)
        self.store = PageStore(size, REQUESTS * PAGES, "cpu", ops.load(backend))
        self.store.pages[0].fill_(0xAB)
        order = torch.randperm(REQUESTS * PAGES, generator=torch.Generator().manual_seed(1)) + 1
        slots = (order[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).int()
        self.req_to_token = torch.zeros(REQUESTS + 1, PAGES * PAGE_TOKENS, dtype=torch.int32)
        self.req_to_token[1:] = slots.view(REQUESTS, -1)
        self.tokens = torch.zeros(REQUESTS, dtype=torch.int64)

    def prefill(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, counts: list[int]) -> torch.Tensor:
        new = torch.tensor(counts)
        plan = steps.plan_extend(self.store, self.req_to_token, ROWS, ROWS.tolist(), self.tokens, new)
        self.tokens = self.tokens + new
        return steps.extend(self.store, 0, query, key, value, plan, self.scoring)

    def decode(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        self.tokens = self.tokens + 1
        plan = steps.plan_decode(self.store, self.req_to_token, ROWS, self.tokens)
        return steps.decode(self.store, 0, query, key, value, plan, self.scoring)

    def verify(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """`tokens` grows by what is accepted, which is for the caller to say."""
        plan = steps.plan_verify(self.store, self.req_to_token, ROWS, self.tokens)
        return steps.verify(self.store, 0, query, key, value, plan, self.scoring)

    scoring = Scoring(DIM**-0.5)


class Texts:
    """Of each request, the queries, keys and values of the tokens that it comes to have."""

    def __init__(self, seed: int, tokens: int = PAGES * PAGE_TOKENS) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.sides = [self.random(REQUESTS, tokens, heads) for heads in (HEADS * GROUP, HEADS, HEADS)]

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, DIM, generator=self.generator)

    def rows(self, first: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
        return [
            torch.cat([side[r, at : at + count] for r, (at, count) in enumerate(zip(first, counts, strict=True))])
            for side in self.sides
        ]

    def drafts(self, first: torch.Tensor, right: list[int]) -> list[torch.Tensor]:
        """DRAFTS rows of each request, of which so many are its true ones."""
        rows = self.rows(first, [DRAFTS] * REQUESTS)
        wrong = torch.arange(DRAFTS) >= torch.tensor(right)[:, None]
        for side in rows:
            side[wrong.flatten()] = self.random(*side[wrong.flatten()].shape[:2])
        return rows


@given(
    prompt=st.lists(st.integers(1, 70), min_size=REQUESTS, max_size=REQUESTS),
    accepted=st.lists(st.lists(st.integers(1, DRAFTS), min_size=REQUESTS, max_size=REQUESTS), max_size=25),
    bits=st.sampled_from([Format(3, 2), Format(4, 3), RAW]),
)
@settings(max_examples=60, deadline=None)
def test_pages_and_frames_are_those_of_plain_decoding(
    prompt: list[int], accepted: list[list[int]], bits: Format
) -> None:
    layout = PageLayout(bits, HEADS, DIM, PAGE_TOKENS)
    speculates, decodes, text = Server(layout, DRAFTS), Server(layout, 0), Texts(sum(prompt))
    rows = text.rows(torch.zeros(REQUESTS, dtype=torch.int64), prompt)
    for server in (speculates, decodes):
        server.prefill(*rows, prompt)
    for counts in accepted:
        speculates.verify(*text.drafts(speculates.tokens, counts))
        speculates.tokens = speculates.tokens + torch.tensor(counts)
    speculates.verify(*text.drafts(speculates.tokens, [1] * REQUESTS))  # stores what was accepted last
    missing = (speculates.tokens - decodes.tokens).tolist()
    if any(missing):  # a plain prefill goes the same way into the pages as decode steps do (test_writes.py)
        decodes.prefill(*text.rows(decodes.tokens, missing), missing)
    assert torch.equal(speculates.store.pages[0][1:], decodes.store.pages[0][1:])
    assert torch.equal(speculates.store.stored_of_frame[ROWS], speculates.tokens)
    for frame, tokens in zip(ROWS.tolist(), speculates.tokens.tolist(), strict=True):
        waiting = slice(tokens % TILE_TOKENS)
        for side in ("frame_key_rot", "frame_value_rot"):
            ours, theirs = (getattr(server.store, side)[0][frame, :, waiting] for server in (speculates, decodes))
            assert torch.equal(ours, theirs)


def test_a_hundred_rejections_leave_pages_as_they_are() -> None:
    layout = PageLayout(Format(4, 2), HEADS, DIM, PAGE_TOKENS)
    server, text, prompt = Server(layout, DRAFTS), Texts(5), [31, 15, 47]
    server.prefill(*text.rows(torch.zeros(REQUESTS, dtype=torch.int64), prompt), prompt)
    before = server.store.pages[0].clone()
    for _ in range(100):
        server.verify(*text.drafts(server.tokens, [0] * REQUESTS))
    assert torch.equal(server.store.pages[0][1:], before[1:])
    assert server.store.stored_of_frame[ROWS].tolist() == prompt


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("scoring", [Scoring(0.2), Scoring(0.2, 5.0), Scoring(0.2, 0.0, 20), Scoring(0.2, 0.0, DRAFTS)])
@pytest.mark.parametrize("bits", [Format(3, 2), Format(4, 3), RAW])
@pytest.mark.parametrize("offset", range(0, TILE_TOKENS, 3))
def test_drafts_attend_as_an_extend_step_of_them_does(
    backend: str, scoring: Scoring, bits: Format, offset: int
) -> None:
    layout = PageLayout(bits, HEADS, DIM, PAGE_TOKENS)
    server, text, prompt = Server(layout, DRAFTS, backend), Texts(offset), [48 + offset, 1 + offset, 16 + offset]
    server.scoring = scoring
    server.prefill(*text.rows(torch.zeros(REQUESTS, dtype=torch.int64), prompt), prompt)
    drafts = text.drafts(server.tokens, [DRAFTS] * REQUESTS)
    out = server.verify(*drafts)
    expected = server.prefill(*drafts, [DRAFTS] * REQUESTS)
    assert (out - expected).abs().max() < budgets.DRAFTS_AS_EXTEND


def test_a_plan_has_shapes_of_the_batch_alone() -> None:
    layout = PageLayout(Format(4, 2), HEADS, DIM, PAGE_TOKENS)
    shapes = []
    for prompt, accepted in (([1, 5, 9], 1), ([15, 30, 47], 4)):
        server, text = Server(layout, DRAFTS), Texts(1)
        server.prefill(*text.rows(server.tokens, prompt), prompt)
        page_table = server.req_to_token[ROWS, ::PAGE_TOKENS].long() // PAGE_TOKENS
        before = torch.tensor(prompt)
        plan = steps.plan_accepted_writes(
            before, torch.full_like(before, accepted), ROWS, page_table, PAGE_TOKENS, DRAFTS
        )
        shapes.append([x.shape for x in vars(plan).values() if isinstance(x, torch.Tensor)])
    assert shapes[0] == shapes[1]
