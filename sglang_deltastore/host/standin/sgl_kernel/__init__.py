"""Stand-in for `sgl_kernel` on a machine without a GPU: importable, and computes only what hybrids need (mamba.py) and
drafts do (speculative.py; of a draft model, draft_attention.py).

The published `sglang-kernel` is a CUDA build whose import needs the NVIDIA driver. SGLang 0.5.23
imports the names in OPS at start on every CPU host and calls none of them while it serves Llama-
and Gemma-3-family models there, so a call is a mistake and raises.

`convert_weight_packed` must stay undefined, here and in `torch.ops.sgl_kernel`: SGLang takes its
presence for a working AMX kernel library and would call the rest of it.
"""

from sgl_kernel import mamba as mamba  # registers torch.ops that models look up when they are imported
from sgl_kernel._refuse import refusing
from sgl_kernel.draft_attention import build_draft_decode_metadata_cpu as build_draft_decode_metadata_cpu
from sgl_kernel.speculative import assign_draft_cache_locs_contiguous_cpu as assign_draft_cache_locs_contiguous_cpu
from sgl_kernel.speculative import assign_extend_cache_locs_cpu as assign_extend_cache_locs_cpu
from sgl_kernel.speculative import assign_req_to_token_pool_cpu as assign_req_to_token_pool_cpu
from sgl_kernel.speculative import build_tree_kernel_efficient_cpu as build_tree_kernel_efficient_cpu
from sgl_kernel.speculative import copy_all_layer_kv_cache_cpu as copy_all_layer_kv_cache_cpu
from sgl_kernel.speculative import fill_accept_out_cache_loc_cpu as fill_accept_out_cache_loc_cpu
from sgl_kernel.speculative import fill_bonus_tokens_cpu as fill_bonus_tokens_cpu
from sgl_kernel.speculative import verify_tree_greedy_cpu as verify_tree_greedy_cpu

__version__ = "0.0.0+deltastore.standin"

OPS: tuple[str, ...] = ("rmsnorm",)

globals().update({name: refusing(name) for name in OPS})
