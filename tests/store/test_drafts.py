"""Steps over drafts: each sees what it would see in plain decoding, and pages never keep what does not stay."""

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
from sglang_deltastore.store.writes import plan_draft_writes
from tests import budgets

HEADS, GROUP, DIM, PAGE_TOKENS, PAGES = 2, 3, 64, 32, 8
REQUESTS, DRAFTS = 3, 5
ROWS, ALL = torch.tensor([2, 3, 1]), [0, 1, 2]
PACKED = Format(3, 2)

Rows = list[torch.Tensor]
"""Queries, keys, values."""


class Server:
    """One layer of a store, and the requests of ROWS on their way through it."""

    def __init__(
        self, draft_tokens: int, fmt: Format = PACKED, window_left: int | None = None, backend: str = "reference"
    ) -> None:
        layout = PageLayout(fmt, HEADS, DIM, PAGE_TOKENS)
        size = StoreSize((layout,), REQUESTS, 0, draft_tokens=draft_tokens)
        self.store = PageStore(size, REQUESTS * PAGES, "cpu", ops.load(backend))
        self.store.pages[0].fill_(0xAB)
        order = torch.randperm(REQUESTS * PAGES, generator=torch.Generator().manual_seed(1)) + 1
        slots = (order[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).int()
        self.req_to_token = torch.zeros(REQUESTS + 1, PAGES * PAGE_TOKENS, dtype=torch.int32)
        self.req_to_token[1:] = slots.view(REQUESTS, -1)
        self.scoring = Scoring(0.2, window_left=window_left)
        #: stored of each request, but for drafts of which it is not known whether they stay
        self.tokens = torch.zeros(REQUESTS, dtype=torch.int64)

    def prefill(self, rows: Rows, counts: list[int]) -> torch.Tensor:
        new = torch.tensor(counts)
        self.store.sink_table.hold({frame: frame for frame in ROWS.tolist()})
        plan = steps.plan_extend(self.store, self.req_to_token, ROWS, ROWS.tolist(), self.tokens, new)
        self.tokens = self.tokens + new
        return steps.extend(self.store, 0, *rows, plan, self.scoring)

    def decode(self, rows: Rows, new_tokens: int, which: list[int]) -> torch.Tensor:
        """A step of these requests -> [requests, new_tokens, Hq, D]. How many stay is for the caller to say, in
        `tokens`."""
        total = self.tokens[which] + new_tokens
        plan = steps.plan_decode(self.store, self.req_to_token, ROWS[which], total, new_tokens)
        return steps.decode(self.store, 0, *rows, plan, self.scoring).unflatten(0, (len(which), new_tokens))

    def waiting(self) -> list[torch.Tensor]:
        """Of each request, the keys and values that its frames hold of its last, unfinished tile."""
        found = []
        for row, tokens in zip(ROWS.tolist(), self.tokens.tolist(), strict=True):
            frame = row + self.store.frame_stride * (tokens // TILE_TOKENS % 2)
            for side in (self.store.frame_key_rot, self.store.frame_value_rot):
                found.append(side[0][frame, :, : tokens % TILE_TOKENS])
        return found

    def whole_tiles(self) -> list[torch.Tensor]:
        """Of each request, the keys and values of its whole tiles."""
        found = []
        for row, tokens in zip(ROWS.tolist(), self.tokens.tolist(), strict=True):
            pages = self.req_to_token[row, ::PAGE_TOKENS].long() // PAGE_TOKENS
            for side in self.store.ops.decode(self.store.pages[0], pages, self.store.layouts[0]):
                found.append(side.transpose(0, 1).flatten(1, 2)[:, : tokens // TILE_TOKENS * TILE_TOKENS])
        return found


class Texts:
    """Of each request, the queries, keys and values of the tokens that it comes to have."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.sides = [self.random(REQUESTS, PAGES * PAGE_TOKENS, heads) for heads in (HEADS * GROUP, HEADS, HEADS)]

    def random(self, *shape: int) -> torch.Tensor:
        """Multiples of 1/8, which rotating by multiples of 1/8 keeps exact, whatever else is in a batch."""
        return torch.randn(*shape, DIM, generator=self.generator).mul(8).round() / 8

    def rows(self, first: torch.Tensor, counts: list[int]) -> Rows:
        return [
            torch.cat([side[r, at : at + count] for r, (at, count) in enumerate(zip(first, counts, strict=True))])
            for side in self.sides
        ]

    def drafts(self, first: torch.Tensor, right: list[int]) -> Rows:
        """DRAFTS rows of each request, of which so many are its true ones."""
        rows = self.rows(first, [DRAFTS] * REQUESTS)
        wrong = (torch.arange(DRAFTS) >= torch.tensor(right)[:, None]).flatten()
        for side in rows:
            side[wrong] = self.random(int(wrong.sum()), side.shape[1])
        return rows


@given(
    prompt=st.lists(st.integers(1, 70), min_size=REQUESTS, max_size=REQUESTS),
    right=st.lists(st.lists(st.integers(1, DRAFTS), min_size=REQUESTS, max_size=REQUESTS), max_size=20),
    fmt=st.sampled_from([PACKED, Format(4, 3), RAW]),
    window_left=st.sampled_from([None, 20, 2]),
)
@settings(max_examples=60, deadline=None)
def test_drafts_that_stay_are_as_decoded_one_by_one(
    prompt: list[int], right: list[list[int]], fmt: Format, window_left: int | None
) -> None:
    """What they read, and what pages and frames hold then."""
    speculates, decodes, text = Server(DRAFTS, fmt, window_left), Server(0, fmt, window_left), Texts(sum(prompt))
    rows = text.rows(torch.zeros(REQUESTS, dtype=torch.int64), prompt)
    for server in (speculates, decodes):
        server.prefill(rows, prompt)
    for counts in right:
        out = speculates.decode(text.drafts(speculates.tokens, counts), DRAFTS, ALL)
        speculates.tokens = speculates.tokens + torch.tensor(counts)
        for draft in range(max(counts)):
            stay = [request for request in ALL if draft < counts[request]]
            new = text.rows(decodes.tokens, [draft < count for count in counts])
            expected = decodes.decode(new, 1, stay)
            torch.testing.assert_close(out[stay, draft], expected[:, 0], rtol=0, atol=budgets.BACKEND_ROTATE)
            decodes.tokens[stay] += 1
    for ours, theirs in zip(speculates.waiting(), decodes.waiting(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(speculates.whole_tiles(), decodes.whole_tiles(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_hundred_rejections_leave_what_is_stored_as_it_is() -> None:
    server, text, prompt = Server(DRAFTS), Texts(5), [31, 15, 47]  # one token before a tile's end
    server.prefill(text.rows(server.tokens, prompt), prompt)
    before = [part.clone() for part in (*server.waiting(), *server.whole_tiles())]
    for _ in range(100):
        server.decode(text.drafts(server.tokens, [0] * REQUESTS), DRAFTS, ALL)
    for ours, theirs in zip((*server.waiting(), *server.whole_tiles()), before, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("right", range(1, DRAFTS + 1))
@pytest.mark.parametrize("offset", range(TILE_TOKENS))
def test_a_prefill_goes_on_behind_drafts(offset: int, right: int) -> None:
    """As after a retraction, or a new turn: it finds the frame of the tile that it goes on with."""
    speculates, plain, text = Server(DRAFTS), Server(0), Texts(offset)
    prompt, counts, more = [16 + offset] * REQUESTS, [right] * REQUESTS, [20] * REQUESTS
    for server in (speculates, plain):
        server.prefill(text.rows(server.tokens, prompt), prompt)
    speculates.decode(text.drafts(speculates.tokens, counts), DRAFTS, ALL)
    speculates.tokens = speculates.tokens + right
    plain.prefill(text.rows(plain.tokens, counts), counts)
    outs = [server.prefill(text.rows(server.tokens, more), more) for server in (speculates, plain)]
    torch.testing.assert_close(*outs, rtol=0, atol=budgets.BACKEND_ROTATE)
    for ours, theirs in zip(speculates.whole_tiles(), plain.whole_tiles(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("window_left", [None, 20])
@pytest.mark.parametrize("fmt", [PACKED, RAW])
def test_compiled_kernels_attend_as_the_twin(fmt: Format, window_left: int | None) -> None:
    servers = [Server(DRAFTS, fmt, window_left, backend) for backend in ("reference", "cpu")]
    text, prompt = Texts(3), [45, 14, 70]
    for server in servers:
        server.prefill(text.rows(server.tokens, prompt), prompt)
    drafts = text.drafts(servers[0].tokens, [DRAFTS] * REQUESTS)
    ours, twin = (server.decode(drafts, DRAFTS, ALL) for server in servers)
    assert (ours - twin).square().mean().sqrt() < budgets.BACKEND_ATTEND_INT8 * twin.square().mean().sqrt()


def test_a_plan_has_shapes_of_the_batch_alone() -> None:
    plans = []
    for prompt in ([1, 5, 9], [15, 30, 47]):
        server = Server(DRAFTS)
        page_table = server.req_to_token[ROWS, ::PAGE_TOKENS].long() // PAGE_TOKENS
        plan = plan_draft_writes(torch.tensor(prompt) + DRAFTS, ROWS, page_table, PAGE_TOKENS, DRAFTS, 4)
        plans.append([x.shape for x in vars(plan).values() if isinstance(x, torch.Tensor)])
    assert plans[0] == plans[1]
