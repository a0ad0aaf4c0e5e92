"""Stand-in for what SGLang computes of drafts on a CPU: slow and obvious, and like its own in what it writes where.

B requests have N drafts each, of which draft 0 is their last token; the others form a tree below it.
"""

from __future__ import annotations

import ctypes

import torch


def reconstruct_indices_from_tree_mask(
    tree_mask: torch.Tensor,
    verified_seq_len: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    batch: int,
    drafts: int,
) -> None:
    """tree_mask [B * N * N] bool: whether draft i has draft j above it, or is it; verified_seq_len [B] -> positions
    [B * N]; retrieve_index [B, N]: a draft's number among all; retrieve_next_token, retrieve_next_sibling [B, N]: of a
    draft, its first child and the next one with its parent, -1: there is none. All are written."""
    above = tree_mask.view(batch, drafts, drafts).tril(-1)
    positions.copy_((above.sum(2) + verified_seq_len[:, None]).flatten())
    retrieve_index.copy_(torch.arange(batch * drafts).view(batch, drafts))
    retrieve_next_token.fill_(-1)
    retrieve_next_sibling.fill_(-1)
    for request in range(batch):
        last_child: dict[int, int] = {}
        for draft in range(1, drafts):
            parents = above[request, draft].nonzero()
            if not len(parents):
                continue
            parent = int(parents[-1])
            if parent in last_child:
                retrieve_next_sibling[request, last_child[parent]] = draft
            else:
                retrieve_next_token[request, parent] = draft
            last_child[parent] = draft


def verify_tree_greedy_cpu(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
) -> None:
    """candidates [B, N]: the drafts; target_predict [B, N]: the model's token behind each. Written are accept_index
    [B, depth]: the drafts, by retrive_index, that the model would have said, -1 behind them; accept_token_num [B]: how
    many but for draft 0; predicts [B * N]: behind each of them the model's token. (retrive is SGLang's spelling.)"""
    accept_index.fill_(-1)
    for request in range(len(candidates)):
        here = 0
        accept_index[request, 0] = retrive_index[request, 0]
        for count in range(1, accept_index.shape[1] + 1):
            wanted = target_predict[request, here]
            predicts[retrive_index[request, here]] = wanted
            accept_token_num[request] = count - 1
            child = int(retrive_next_token[request, here])
            while child != -1 and candidates[request, child] != wanted:
                child = int(retrive_next_sibling[request, child])
            if child == -1 or count == accept_index.shape[1]:
                break
            here = child
            accept_index[request, count] = retrive_index[request, here]


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    _width: int,
) -> None:
    """out_cache_loc [slots], the requests' one after the other, into req_to_token [rows, width]: of each request, in
    its row, from start_offset to before end_offset, all [B]."""
    first = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        req_to_token[row, start:end] = out_cache_loc[first : first + end - start]
        first += end - start


def assign_extend_cache_locs_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    _width: int,
) -> None:
    """req_to_token [rows, width] -> out_cache_loc, which is written from its beginning on: of each request, in its row,
    what lies from start_offset to before end_offset, all [B]."""
    bounds = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    slots = torch.cat([req_to_token[row, start:end] for row, start, end in bounds])
    out_cache_loc[: len(slots)] = slots


def fill_accept_out_cache_loc_cpu(
    accept_index: torch.Tensor, out_cache_loc: torch.Tensor, accept_out_cache_loc: torch.Tensor
) -> None:
    """accept_index int, -1: none; out_cache_loc [B * N] -> accept_out_cache_loc, which is written from its beginning
    on: the accepted drafts' slots."""
    accepted = accept_index[accept_index >= 0].long()
    accept_out_cache_loc[: len(accepted)] = out_cache_loc[accepted]


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    out_cache_loc: torch.Tensor,
    width: int,
    branches: int,
    steps: int,
) -> None:
    """As assign_extend_cache_locs_cpu, of each request what lies from seq_lens on: `steps` slots for each branch."""
    end = seq_lens + branches * steps
    assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, seq_lens, end, out_cache_loc, width)


def build_tree_kernel_efficient_cpu(
    parent_list: torch.Tensor,
    selected_index: torch.Tensor,
    seq_lens: torch.Tensor,
    tree_mask: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    topk: int,
    _depth: int,
    drafts: int,
    _mask_mode: int,
) -> None:
    """A draft model's tree. It made `topk` guesses behind each of the nodes that it went on from; selected_index
    [B, N - 1]: which of all guesses are drafts 1 .. N - 1; parent_list [B, nodes]: which guess each node is, but the
    first, draft 0. Written are tree_mask [B * N * N] and what reconstruct_indices_from_tree_mask writes."""
    batch, mask = len(seq_lens), torch.eye(drafts, dtype=torch.bool).repeat(len(seq_lens), 1, 1)
    for request in range(batch):
        guesses = selected_index[request].tolist()
        for draft, guess in enumerate(guesses, start=1):
            node = guess // topk
            parent = 1 + guesses.index(int(parent_list[request, node])) if node else 0
            mask[request, draft] |= mask[request, parent]
    tree_mask.copy_(mask.flatten())
    reconstruct_indices_from_tree_mask(
        tree_mask, seq_lens, positions, retrieve_index, retrieve_next_token, retrieve_next_sibling, batch, drafts
    )


def fill_bonus_tokens_cpu(
    accept_tokens: torch.Tensor, accept_lens: torch.Tensor, bonus_tokens: torch.Tensor, width: int
) -> None:
    """accept_tokens [B * width], of each request those that stay, accept_lens [B] of them -> bonus_tokens [B]: the last
    one of each."""
    last = (accept_lens.long() - 1)[:, None]
    bonus_tokens.copy_(accept_tokens.view(-1, width).gather(1, last)[:, 0])


def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor, strides: torch.Tensor, tgt_loc: torch.Tensor, src_loc: torch.Tensor
) -> None:
    """Tokens of a KV pool from slots src_loc to slots tgt_loc. data_ptrs, strides: of each of its buffers, where it
    begins and how many bytes a slot has."""
    for first, stride in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        tokens = [ctypes.string_at(first + slot * stride, stride) for slot in src_loc.tolist()]
        for slot, token in zip(tgt_loc.tolist(), tokens, strict=True):
            ctypes.memmove(first + slot * stride, token, stride)
