"""Stand-in for what SGLang computes of drafts on a CPU: slow and obvious, and like its own in what it writes where.

B requests have N drafts each, of which draft 0 is their last token; the others form a tree below it.
"""

from __future__ import annotations

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
