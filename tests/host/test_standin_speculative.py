"""What the stand-in for sgl_kernel computes of drafts, on trees small enough to read."""

from __future__ import annotations

import importlib
import types

import pytest
import torch

#: of each draft, the one above it: a chain of three with a branch off its first, and one whose drafts are all guesses
#: for the same place
PARENTS = [[-1, 0, 1, 2, 0], [-1, 0, 0, 0, 0]]
DRAFTS = 5


@pytest.fixture
def ops(standin: types.ModuleType) -> types.ModuleType:
    return importlib.import_module("sgl_kernel.speculative")


def links(ops: types.ModuleType) -> tuple[torch.Tensor, ...]:
    mask = torch.eye(DRAFTS, dtype=torch.bool).repeat(2, 1, 1)
    for request, parents in enumerate(PARENTS):
        for draft in range(1, DRAFTS):
            mask[request, draft] |= mask[request, parents[draft]]
    positions = torch.zeros(2 * DRAFTS, dtype=torch.int64)
    found = [torch.zeros(2, DRAFTS, dtype=torch.int64) for _ in range(3)]
    ops.reconstruct_indices_from_tree_mask(mask.flatten(), torch.tensor([7, 100]), positions, *found, 2, DRAFTS)
    return positions, *found


def test_links_of_trees(ops: types.ModuleType) -> None:
    positions, index, child, sibling = links(ops)
    assert positions.tolist() == [7, 8, 9, 10, 8, 100, 101, 101, 101, 101]
    assert index.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert child.tolist() == [[1, 2, 3, -1, -1], [1, -1, -1, -1, -1]]
    assert sibling.tolist() == [[-1, 4, -1, -1, -1], [-1, 2, 3, 4, -1]]


def test_what_the_model_would_have_said_is_accepted(ops: types.ModuleType) -> None:
    _, *found = links(ops)
    candidates = torch.tensor([[1, 2, 3, 4, 9], [1, 2, 3, 4, 5]])
    #: behind each draft the model's own: request 0 agrees with two drafts of its chain, request 1 with its third guess
    says = torch.tensor([[2, 3, 8, 0, 0], [4, 0, 0, 6, 0]])
    predicts = torch.zeros(2 * DRAFTS, dtype=torch.int32)
    accepted, count = torch.zeros(2, DRAFTS, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    ops.verify_tree_greedy_cpu(predicts, accepted, count, candidates, *found, says)
    assert accepted.tolist() == [[0, 1, 2, -1, -1], [5, 8, -1, -1, -1]]
    assert count.tolist() == [2, 1]
    assert predicts[[0, 1, 2, 5, 8]].tolist() == [2, 3, 8, 4, 6]


def test_no_more_is_accepted_than_there_is_room_for(ops: types.ModuleType) -> None:
    _, *found = links(ops)
    candidates = says = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    predicts = torch.zeros(2 * DRAFTS, dtype=torch.int32)
    accepted, count = torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    ops.verify_tree_greedy_cpu(predicts, accepted, count, candidates, *found, says)
    assert accepted.tolist() == [[0, 1], [5, 6]]
    assert count.tolist() == [1, 1]
    assert predicts[[0, 1, 5, 6]].tolist() == [1, 1, 1, 1]


def test_slots_go_into_rows_and_come_out_of_them(ops: types.ModuleType) -> None:
    rows, start, end = torch.tensor([2, 0]), torch.tensor([1, 0]), torch.tensor([3, 3])
    table, slots = torch.zeros(3, 4, dtype=torch.int32), torch.arange(50, 55)
    ops.assign_req_to_token_pool_cpu(rows, table, start, end, slots, 4)
    assert table.tolist() == [[52, 53, 54, 0], [0, 0, 0, 0], [0, 50, 51, 0]]
    out = torch.full((6,), -7)
    ops.assign_extend_cache_locs_cpu(rows, table, start, end, out, 4)
    assert out.tolist() == [50, 51, 52, 53, 54, -7]


def test_guesses_that_a_draft_model_kept_are_a_tree(ops: types.ModuleType) -> None:
    """Two guesses behind each node: of draft 0 guesses 0 and 1, of guess 1 guesses 2 and 3, of guess 2 guesses 4 and 5.
    Kept are 0, 1, 2 and 5."""
    mask = torch.zeros(DRAFTS * DRAFTS, dtype=torch.bool)
    positions = torch.zeros(DRAFTS, dtype=torch.int64)
    index, child, sibling = (torch.full((1, DRAFTS), -1) for _ in range(3))
    nodes, kept = torch.tensor([[-1, 1, 2]]), torch.tensor([[0, 1, 2, 5]])
    links = index, child, sibling
    ops.build_tree_kernel_efficient_cpu(nodes, kept, torch.tensor([7]), mask, positions, *links, 2, 3, DRAFTS, 1)
    above = [[0], [0, 1], [0, 2], [0, 2, 3], [0, 2, 3, 4]]
    assert [row.nonzero().flatten().tolist() for row in mask.view(DRAFTS, DRAFTS)] == above
    assert positions.tolist() == [7, 8, 8, 9, 10]
    assert (child.tolist(), sibling.tolist()) == ([[1, -1, 3, 4, -1]], [[-1, 2, -1, -1, -1]])
    assert index.tolist() == [[0, 1, 2, 3, 4]]


def test_guesses_one_behind_the_other_are_a_chain(ops: types.ModuleType) -> None:
    mask, positions = torch.zeros(2 * 9, dtype=torch.bool), torch.zeros(6, dtype=torch.int64)
    links = [torch.full((2, 3), -1) for _ in range(3)]
    nodes, kept = torch.tensor([[-1, 0]] * 2), torch.tensor([[0, 1]] * 2)
    ops.build_tree_kernel_efficient_cpu(nodes, kept, torch.tensor([7, 100]), mask, positions, *links, 1, 2, 3, 1)
    assert torch.equal(mask.view(2, 3, 3), torch.ones(2, 3, 3, dtype=torch.bool).tril())
    assert positions.tolist() == [7, 8, 9, 100, 101, 102]
    assert links[1].tolist() == [[1, 2, -1]] * 2


def test_a_draft_models_slots_are_those_behind_what_is_stored(ops: types.ModuleType) -> None:
    table, out = torch.arange(24).view(3, 8).int(), torch.full((7,), -7)
    ops.assign_draft_cache_locs_contiguous_cpu(torch.tensor([2, 0]), table, torch.tensor([1, 4]), out, 8, 1, 3)
    assert out.tolist() == [17, 18, 19, 4, 5, 6, -7]


def test_the_last_accepted_token_goes_on(ops: types.ModuleType) -> None:
    last = torch.zeros(2, dtype=torch.int32)
    accepted = torch.tensor([10, 11, 12, 20, 21, 22], dtype=torch.int32)
    ops.fill_bonus_tokens_cpu(accepted, torch.tensor([3, 1], dtype=torch.int32), last, 3)
    assert last.tolist() == [12, 20]


def test_tokens_move_between_slots_of_every_buffer(ops: types.ModuleType) -> None:
    generator = torch.Generator().manual_seed(2)
    buffers = [torch.randint(-(2**62), 2**62, (4, width), generator=generator) for width in (3, 2)]
    expected = [buffer[[1, 0, 2, 2]] for buffer in buffers]
    pointers, strides = (torch.tensor(x) for x in zip(*[(b.data_ptr(), b[0].nbytes) for b in buffers], strict=True))
    ops.copy_all_layer_kv_cache_cpu(pointers, strides, torch.tensor([0, 1, 3]), torch.tensor([1, 0, 2]))
    assert all(map(torch.equal, buffers, expected))


def test_accepted_slots_come_first(ops: types.ModuleType) -> None:
    accepted, out = torch.tensor([[0, 2, -1], [3, -1, -1]], dtype=torch.int32), torch.zeros(6, dtype=torch.int64)
    ops.fill_accept_out_cache_loc_cpu(accepted, torch.arange(40, 46), out)
    assert out.tolist() == [40, 42, 43, 0, 0, 0]
