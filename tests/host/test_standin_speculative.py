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


def test_accepted_slots_come_first(ops: types.ModuleType) -> None:
    accepted, out = torch.tensor([[0, 2, -1], [3, -1, -1]], dtype=torch.int32), torch.zeros(6, dtype=torch.int64)
    ops.fill_accept_out_cache_loc_cpu(accepted, torch.arange(40, 46), out)
    assert out.tolist() == [40, 42, 43, 0, 0, 0]
