"""Stand-ins for what has to be compiled for a GPU, so that the Python around it runs without one: our own modules (on
fibers) and FlashInfer's (in torch, with its real signatures)."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field

import flashinfer
import torch

from deltastore_kernels.context import Scoring
from deltastore_kernels.cuda_build import Kernels
from deltastore_kernels.layout import PageLayout
from tests.kernels.cuda import fiber_case
from tests.kernels.paged_context import PagedContext, Sinks


@dataclass
class FiberModule:
    """As cuda_build.load gives them; arguments as csrc/cuda/binding.cu takes them."""

    kernels: Kernels
    splits: list[int] = field(default_factory=list)

    def attend_decode(self, query_rot, *rest) -> None:
        context, (partial_out, partial_log2) = self._context(rest[:10], rest[12:15]), rest[10:12]
        window_left, scale, soft_cap = rest[15:]
        scoring = Scoring(scale, soft_cap, None if window_left < 0 else window_left)
        self.splits.append(splits := partial_out.shape[2])
        outs, logs = fiber_case.attend_parts(query_rot, context, scoring, splits)
        partial_out.copy_(outs)
        partial_log2.copy_(logs)

    def decode_context(self, requests, positions, *rest) -> None:
        assert requests.dtype == positions.dtype == torch.int32
        context, (key_rot, value_rot) = self._context(rest[:10], rest[12:]), rest[10:12]
        sides = fiber_case.decode_context(requests, positions, context, key_rot.dtype)
        key_rot.copy_(sides[0])
        value_rot.copy_(sides[1])

    def _context(self, tensors, numbers) -> PagedContext:
        pages, page_table, packed_tokens, frame_key, frame_value, frame_ids, frame_tokens, *sinks = tensors
        for index in (page_table, packed_tokens, frame_ids, frame_tokens, sinks[2]):
            assert index.dtype == torch.int32
            assert index.is_contiguous()
        kv_heads, page_tokens, sink_tokens = numbers
        layout = PageLayout(self.kernels.format, kv_heads, self.kernels.head_dim, page_tokens)
        return PagedContext(
            layout, pages, page_table, packed_tokens, frame_key, frame_value, frame_ids, frame_tokens,
            Sinks(*sinks) if sink_tokens else None,
        )  # fmt: skip


class Ragged:
    """FlashInfer's BatchPrefillWithRaggedKVCacheWrapper: refuses what the real one's signatures refuse."""

    real = flashinfer.BatchPrefillWithRaggedKVCacheWrapper

    def __init__(self, *args, **kwargs) -> None:
        self.created = inspect.signature(self.real.__init__).bind(self, *args, **kwargs).arguments
        self.plans: list[dict] = []

    def reset_workspace_buffer(self, *args, **kwargs) -> None:
        self.reset = inspect.signature(self.real.reset_workspace_buffer).bind(self, *args, **kwargs).arguments

    def plan(self, *args, **kwargs) -> None:
        plan = inspect.signature(self.real.plan).bind(self, *args, **kwargs)
        plan.apply_defaults()
        self.plans.append(plan.arguments)

    def run(self, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        given = inspect.signature(self.real.run).bind(self, *args, **kwargs)
        given.apply_defaults()
        query, key, value = (given.arguments[name] for name in "qkv")
        plan = self.plans[-1]
        assert given.arguments["return_lse"]
        assert given.arguments["lse_base"] == "log2"
        assert query.dtype == key.dtype == value.dtype == plan["q_data_type"] == plan["kv_data_type"]
        for tensor, heads in ((query, "num_qo_heads"), (key, "num_kv_heads"), (value, "num_kv_heads")):
            assert tensor.shape[1:] == (plan[heads], plan["head_dim_qk"])
            assert tensor.is_contiguous()
        assert (len(query), len(key)) == (int(plan["qo_indptr"][-1]), int(plan["kv_indptr"][-1]))
        out, lse = torch.empty_like(query), torch.empty(query.shape[:2])
        for i in range(len(plan["qo_indptr"]) - 1):
            rows, columns = (slice(*plan[name][i : i + 2].tolist()) for name in ("qo_indptr", "kv_indptr"))
            assert columns.stop > columns.start, "a request without keys"
            out[rows], lse[rows] = _attend(query[rows], key[columns], value[columns], plan)
        return out, lse


def _attend(query, key, value, plan) -> tuple[torch.Tensor, torch.Tensor]:
    key, value = (side.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1) for side in (key, value))
    scores = torch.einsum("rhd,nhd->rhn", query.float(), key) * plan["sm_scale"]
    if cap := plan["logits_soft_cap"]:
        scores = cap * torch.tanh(scores / cap)
    if plan["causal"]:
        after = torch.arange(len(key))[None] > torch.arange(len(query))[:, None] + len(key) - len(query)
        scores.masked_fill_(after[:, None], -torch.inf)
    out = torch.einsum("rhn,nhd->rhd", scores.softmax(-1), value)
    return out.to(query.dtype), scores.logsumexp(-1) / math.log(2)


class PagedDecode:
    """FlashInfer's BatchDecodeWithPagedKVCacheWrapper, for pages [pages, 2, P, H, D]."""

    real = flashinfer.BatchDecodeWithPagedKVCacheWrapper

    def __init__(self, *args, **kwargs) -> None:
        inspect.signature(self.real.__init__).bind(self, *args, **kwargs)

    def plan(self, *args, **kwargs) -> None:
        self.planned = inspect.signature(self.real.plan).bind(self, *args, **kwargs).arguments
        # The real one takes any keyword; those that mean something are in its documentation.
        assert all(f"{name} : " in self.real.plan.__doc__ for name in self.planned["kwargs"])

    def run(self, *args, **kwargs) -> torch.Tensor:
        given = inspect.signature(self.real.run).bind(self, *args, **kwargs).arguments
        query, pages, plan = given["q"], given["paged_kv_cache"], self.planned
        assert pages.shape[1:] == (2, plan["page_size"], plan["num_kv_heads"], plan["head_dim"])
        assert pages.dtype == plan["kwargs"]["kv_data_type"]
        out = torch.empty_like(query)
        for i, (begin, end) in enumerate(zip(plan["indptr"][:-1], plan["indptr"][1:], strict=True)):
            keys, values = pages[plan["indices"][begin:end].long()].float().unbind(1)
            sides = keys.flatten(0, 1), values.flatten(0, 1)
            constants = {"sm_scale": plan["head_dim"] ** -0.5, "logits_soft_cap": 0, "causal": False}
            out[i : i + 1] = _attend(query[i : i + 1], *sides, constants)[0]
        return out


class FlashInfer:
    """The package, as far as it is used."""

    BatchPrefillWithRaggedKVCacheWrapper = Ragged

    @staticmethod
    def merge_state(*args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        given = inspect.signature(flashinfer.merge_state).bind(*args, **kwargs).arguments
        outs, logs = (given["v_a"], given["v_b"]), (given["s_a"], given["s_b"])
        assert logs[0].dtype == logs[1].dtype == torch.float32
        total = torch.logaddexp2(*logs)
        out = sum(out.float() * (log - total).exp2()[..., None] for out, log in zip(outs, logs, strict=True))
        return out.to(outs[0].dtype), total
