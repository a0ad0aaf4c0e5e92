"""What contexts share, against plain sets of paths: every page is named by all the pages before it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_deltastore.sharing import PageRecords, RunningContext, Shape, TreePages

P = 16
Path = tuple[int, ...]


def slots_of(pages: list[int]) -> torch.Tensor:
    return (torch.tensor(pages, dtype=torch.int64)[:, None] * P + torch.arange(P)).flatten()


@dataclass
class Forest:
    """Stored paths, running requests (where they leave the tree, and their own tokens), and where prompts ended."""

    ended: list[Path]
    running: list[tuple[Path, int]]
    prompt_ends: set[Path]

    def __post_init__(self) -> None:
        stored = [path[:length] for path in self.paths() for length in range(1, len(path) + 1)]
        self.page_of = {path: number for number, path in enumerate(dict.fromkeys(stored), start=1)}

    def paths(self) -> list[Path]:
        return [*self.ended, *(path for path, _ in self.running)]

    def shape(self, records: PageRecords | None = None) -> Shape:
        paths = list(self.page_of)
        np.random.default_rng(len(paths)).shuffle(paths)
        ids, parents = ([self.page_of.get(path, 0) for path in of] for of in (paths, [path[:-1] for path in paths]))
        starts = [(len(path) - 1) * P for path in paths]
        pages = TreePages(*(np.array(values, dtype=np.int64) for values in (ids, parents, starts)))
        records = records or PageRecords(len(self.page_of), P)
        for path in self.prompt_ends & self.page_of.keys():
            records.ends_prompt[self.page_of[path]] = True
        running = [RunningContext(self.page_of.get(path, 0), own_tokens) for path, own_tokens in self.running]
        return Shape(pages, running, records, P)

    def contexts(self) -> list[tuple[Path, int]]:
        """Running ones, and the leaves that none of them continues."""
        continued = {path[:length] for path in self.paths() for length in range(len(path))}
        leaves = {path for path in self.ended if path and path not in continued}
        return [*self.running, *((leaf, 0) for leaf in sorted(leaves - {path for path, _ in self.running}))]

    def conversations(self) -> list[list[tuple[Path, int]]]:
        """Contexts by the first prompt that ended in their path; those without one are alone."""
        together: dict[object, list[tuple[Path, int]]] = defaultdict(list)
        for number, (path, own_tokens) in enumerate(self.contexts()):
            ends = [path[:length] for length in range(1, len(path) + 1) if path[:length] in self.prompt_ends]
            together[ends[0] if ends else number].append((path, own_tokens))
        return list(together.values())


def tokens_as_a_tree(contexts: list[tuple[Path, int]]) -> int:
    pages = {path[:length] for path, _ in contexts for length in range(1, len(path) + 1)}
    return len(pages) * P + sum(own_tokens for _, own_tokens in contexts)


def prefixes(path: Path) -> set[Path]:
    return {path[:length] for length in range(1, len(path) + 1)}


paths = st.lists(st.integers(0, 2), max_size=9).map(tuple)
forests = st.builds(
    Forest,
    ended=st.lists(paths, max_size=12),
    running=st.lists(st.tuples(paths, st.integers(0, 40)), max_size=4),
    prompt_ends=st.sets(paths.filter(len), max_size=6),
)


@settings(deadline=None, max_examples=300)
@given(forests)
def test_totals_are_those_of_plain_sets(forest: Forest) -> None:
    shape, contexts, conversations = forest.shape(), forest.contexts(), forest.conversations()
    assert shape.num_contexts == len(contexts)
    assert shape.num_conversations == len(conversations)
    assert shape.logical_tokens == sum(len(path) * P + own_tokens for path, own_tokens in contexts)
    assert shape.conversation_tokens == sum(map(tokens_as_a_tree, conversations))
    assert shape.stored_tokens == tokens_as_a_tree(contexts)
    assert shape.logical_tokens >= shape.conversation_tokens >= shape.stored_tokens


@settings(deadline=None, max_examples=300)
@given(forests)
def test_nodes_are_what_contexts_share(forest: Forest) -> None:
    shape = forest.shape()
    path_of = {page: path for path, page in forest.page_of.items()}
    nodes = shape.hottest(limit=len(forest.page_of))
    assert len(nodes) == len(shape.heads)
    assert sum(node.tokens for node in nodes) == len(forest.page_of) * P
    for node in nodes:
        path = path_of[node.id]
        assert node.start_tokens == (len(path) - 1) * P
        below = [context for context, _ in forest.contexts() if context[: len(path)] == path]
        assert node.contexts == len(below)
        assert node.running == sum(running[: len(path)] == path for running, _ in forest.running)
        assert node.conversations == sum(
            any(context[: len(path)] == path for context, _ in group) for group in forest.conversations()
        )
        assert node.subtree_tokens == sum(other[: len(path)] == path for other in forest.page_of) * P
        assert node.children == sum(other.parent == node.id for other in nodes)
        # All its pages are in the same contexts, and the next page (or the one before) is not, or a prompt ends there.
        length = len(path) - 1 + node.tokens // P
        whole = next(context for context in below if len(context) >= length)[:length]
        assert {context for context in below if context[:length] == whole} == set(below)
        if node.parent:
            parent = next(other for other in nodes if other.id == node.parent)
            before = path[:-1]
            assert parent.contexts != node.contexts or before in forest.prompt_ends
            assert path_of[parent.id] == before[: parent.start_tokens // P + 1]


def test_two_users_one_prompt_a_second_turn_and_a_branch() -> None:
    """Shared prefix of 3 pages; Ada's turn 1 (pages 4, 5), turn 2, and turn 2 anew; Ben's first turn still runs."""
    tools: Path = (1, 1, 1)
    ada = (*tools, 2, 2)
    forest = Forest(
        ended=[(*ada, 3), (*ada, 4, 4)], running=[(tools, 21)], prompt_ends={(*tools, 2), (*ada, 3), (*ada, 4)}
    )
    shape = forest.shape()
    assert (shape.num_contexts, shape.num_conversations) == (3, 2)
    assert shape.logical_tokens == (6 + 7 + 3) * P + 21
    assert shape.conversation_tokens == (8 + 3) * P + 21
    assert shape.stored_tokens == 8 * P + 21
    tools_node = next(node for node in shape.hottest(1) if not node.parent)
    assert (tools_node.tokens, tools_node.contexts, tools_node.conversations) == (3 * P, 3, 2)


def test_the_hottest_come_with_all_above_them() -> None:
    forest = Forest([(1, 2, 3), (1, 2, 4), (1, 5), (6,)], [], set())
    records = PageRecords(len(forest.page_of), P)
    records.hits[forest.page_of[1, 2, 4]] = 7
    shown = forest.shape(records).hottest(limit=1)
    assert [node.id for node in shown] == [forest.page_of[path] for path in ((1,), (1, 2), (1, 2, 4))]
    assert [node.hit_tokens for node in shown] == [0, 0, 7 * P]
    assert [node.hits for node in shown] == [0, 0, 7]


def test_an_empty_tree() -> None:
    shape = Forest([], [((), 5)], set()).shape()
    assert shape.hottest(10) == ()
    assert (shape.logical_tokens, shape.conversation_tokens, shape.stored_tokens) == (5, 5, 5)
    assert (shape.num_contexts, shape.num_conversations) == (1, 1)


def test_records_begin_anew_with_the_page() -> None:
    records, pages = PageRecords(12, P, keep_tokens=True), torch.tensor([3, 4])
    records.begun(pages)
    records.ended(slots_of([3, 4]), hit_tokens=0, prompt_tokens=P + 1)
    assert records.shared_tokens(pages) == 0
    records.ended(slots_of([3]), hit_tokens=P, prompt_tokens=P)
    assert records.shared_tokens(pages) == P
    assert (records.requests[pages].tolist(), records.hits[pages].tolist()) == ([2, 1], [1, 0])
    assert records.ends_prompt[pages].tolist() == [True, True]
    records.begun(torch.tensor([3]))
    assert records.requests[3] == records.hits[3] == records.ends_prompt[3] == 0
    assert records.requests[4] == 1


def test_a_prompts_end_counts_only_where_its_page_is_stored() -> None:
    records = PageRecords(12, P)
    records.ended(slots_of([3, 4]), hit_tokens=0, prompt_tokens=2 * P + 1)
    assert not records.ends_prompt.any()
    records.ended(slots_of([3, 4]), hit_tokens=0, prompt_tokens=P)
    assert records.ends_prompt.nonzero().flatten().tolist() == [3]


def test_tokens_are_kept_only_if_asked_for() -> None:
    ids = list(range(100, 100 + 2 * P))
    kept, not_kept = PageRecords(12, P, keep_tokens=True), PageRecords(12, P)
    for records in (kept, not_kept):
        records.stored(slots_of([7, 2]), ids)
    assert not_kept.token_ids is None
    assert kept.token_ids is not None and kept.token_ids[[7, 2]].flatten().tolist() == ids
    assert kept.nbytes - not_kept.nbytes == 13 * P * 4


def test_pages_from_token_rows_in_any_order() -> None:
    """Pages 5 -> 9 -> 2, and 9's sibling 4."""
    slots = torch.cat([slots_of([page]) for page in (5, 9, 2, 4)]).numpy()
    positions = np.concatenate([start + np.arange(P) for start in (0, P, 2 * P, P)])
    before = np.where(np.arange(4 * P) % P == 0, np.repeat([-1, 5 * P + 15, 9 * P + 15, 5 * P + 15], P), slots - 1)
    order = np.random.default_rng(0).permutation(len(slots))
    pages = TreePages.of_slots(slots[order], positions[order], before[order], P)
    rows = zip(pages.ids.tolist(), pages.parents.tolist(), pages.start_tokens.tolist(), strict=True)
    assert sorted(rows) == [(2, 9, 2 * P), (4, 5, P), (5, 0, 0), (9, 5, P)]


def test_where_a_running_request_leaves_the_tree() -> None:
    in_nodes = torch.zeros(13, dtype=torch.bool)
    in_nodes[[5, 9]] = True
    slots = slots_of([5, 9, 11, 12])[: 3 * P + 3]
    assert RunningContext.of_slots(slots, in_nodes, P) == RunningContext(9, P + 3)
    assert RunningContext.of_slots(slots_of([11])[:7], in_nodes, P) == RunningContext(0, 7)
