"""Models are refused by what was built and by how their code calls attention, before the first request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sglang_deltastore.policy.layer_rules import check_layers, check_windows
from sglang_deltastore.policy.refusals import Refused


class Attention(nn.Module):
    """The fields of SGLang's RadixAttention that a model sets."""

    def __init__(self, layer_id: int, **given: Any) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.attn_type = SimpleNamespace(value="decoder")
        self.is_cross_attention = self.use_irope = False
        self.logit_capping_method, self.pos_encoding_mode = "tanh", "NONE"
        self.qk_head_dim = self.v_head_dim = 64
        self.tp_q_head_num, self.tp_k_head_num, self.tp_v_head_num = 4, 2, 2
        self.xai_temperature_len = -1
        for name, value in given.items():
            setattr(self, name, value)


class Plain(nn.Module):
    def __init__(self, layer_id: int) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.attn = Attention(layer_id)

    def forward(self, q: Any, k: Any, v: Any, forward_batch: Any) -> Any:
        return self.attn(q, k, v, forward_batch, save_kv_cache=True)


class WithSinks(Plain):
    """As gpt-oss has them: a parameter, passed to each call."""

    def __init__(self, layer_id: int) -> None:
        super().__init__(layer_id)
        self.sinks = nn.Parameter(torch.zeros(4))

    def forward(self, q: Any, k: Any, v: Any, forward_batch: Any) -> Any:
        return self.attn(q, k, v, forward_batch, sinks=self.sinks)


class SinksOfAllRanks(WithSinks):
    """Not cut to this rank's query heads."""

    def __init__(self, layer_id: int) -> None:
        super().__init__(layer_id)
        self.sinks = nn.Parameter(torch.zeros(8))


class SinksOff(WithSinks):
    """As Granite without sinks: the code knows them, the model has none."""

    def __init__(self, layer_id: int) -> None:
        Plain.__init__(self, layer_id)
        self.sinks = None


class SinkBias(Plain):
    """In a buffer that attention is not given."""

    def __init__(self, layer_id: int) -> None:
        super().__init__(layer_id)
        self.register_buffer("attention_sink_bias", torch.zeros(4))


class SharesKV(Plain):
    """As Gemma-3n: a late layer reads an early one's cache."""

    def __init__(self, layer_id: int) -> None:
        super().__init__(layer_id)
        self.is_kv_shared_layer = layer_id > 0


class ReadsAnother(Plain):
    """As IQuest-LoopCoder: attention layers in a list, the first read again without keys."""

    def __init__(self, layer_id: int) -> None:
        super().__init__(layer_id)
        self.attn = nn.ModuleList([Attention(layer_id)])

    def forward(self, q: Any, k: Any, v: Any, forward_batch: Any, loop: int) -> Any:
        if loop == 0:
            return self.attn[0](q, k, v, forward_batch)
        return self.attn[0](q, None, None, forward_batch, save_kv_cache=False)


class OtherBackend(Plain):
    """As HunYuan-V3: a call without keys in a branch for another backend, which is not taken."""

    def __init__(self, layer_id: int) -> None:
        super().__init__(layer_id)
        self.use_other_backend: bool | None = None

    def forward(self, q: Any, k: Any, v: Any, forward_batch: Any) -> Any:
        if self.use_other_backend and not forward_batch.idle:
            return self.attn(q, None, None, forward_batch, save_kv_cache=False)
        return self.attn(q, k, v, forward_batch)


class Speculates(Plain):
    """As MiMo-V2: a method without keys, for verifying drafts."""

    def _forward_rope_store(self, q: Any, forward_batch: Any) -> Any:
        return self.attn(q, None, None, forward_batch, save_kv_cache=False)


class LogSumExp(Plain):
    """As IQuest-Q1, which corrects the output by the softmax's own sum."""

    def __init__(self, layer_id: int) -> None:
        super().__init__(layer_id)
        self.enable_sink_attention = True

    def forward(self, q: Any, k: Any, v: Any, forward_batch: Any) -> Any:
        if self.enable_sink_attention:
            return self.attn(q, k, v, forward_batch, return_lse=True)
        return self.attn(q, k, v, forward_batch)


class Unwrapped(Plain):
    """As Baichuan: more arguments from a dict."""

    def __init__(self, layer_id: int) -> None:
        super().__init__(layer_id)
        self.attn_kwargs = {"slopes": torch.ones(4)}

    def forward(self, q: Any, k: Any, v: Any, forward_batch: Any) -> Any:
        return self.attn(q, k, v, forward_batch, **self.attn_kwargs)


class NothingMore(Unwrapped):
    def __init__(self, layer_id: int) -> None:
        super().__init__(layer_id)
        self.attn_kwargs = {}


class Grok(Plain):
    """A field of the layer that is set after it is made."""

    def __init__(self, layer_id: int) -> None:
        super().__init__(layer_id)
        self.attn.xai_temperature_len = 1024


def check(*owners: nn.Module) -> None:
    model = nn.ModuleList(owners)
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    check_layers(sorted(layers, key=lambda layer: layer.layer_id), model)


@pytest.mark.parametrize("owner", [Plain, WithSinks, SinksOff, OtherBackend, Speculates, NothingMore])
def test_what_is_served(owner: type[Plain]) -> None:
    check(owner(3), owner(4), owner(5))


@pytest.mark.parametrize(
    ("owner", "complaint"),
    [
        (SinksOfAllRanks, "layer 0 (SinksOfAllRanks): sinks is a tensor of shape (8,); allowed is (4,): a logit for"),
        (SinkBias, "attention_sink_bias is a tensor of shape (4,); allowed is learned attention sinks that each call"),
        (SharesKV, "layer 1 (SharesKV): is_kv_shared_layer is True; allowed is False"),
        (ReadsAnother, "layer 0 (ReadsAnother): an argument of its attention is k and v None"),
        (LogSumExp, "layer 0 (LogSumExp): an argument of its attention is return_lse; allowed is one of q, k, v"),
        (Unwrapped, "layer 0 (Unwrapped): an argument of its attention is slopes"),
        (Grok, "layer 0: xai_temperature_len is 1024; allowed is -1"),
    ],
)
def test_models_are_refused_by_name(owner: type[Plain], complaint: str) -> None:
    with pytest.raises(Refused) as refusal:
        check(owner(0), owner(1))
    assert complaint in str(refusal.value)
    assert "serve this model with --kv-compress none" in str(refusal.value)


@pytest.mark.parametrize(
    ("second", "complaint"),
    [
        (Attention(0), "layer_id is 0; allowed is 1 (one KV cache for each layer"),
        (Attention(2), "layer_id is 2; allowed is 1"),
        (Attention(1, attn_type=SimpleNamespace(value="encoder_only")), "attn_type is encoder_only"),
        (Attention(1, is_cross_attention=True), "cross attention"),
        (Attention(1, use_irope=True), "chunked attention (irope) is True"),
        (Attention(1, logit_capping_method="other"), "logit_capping_method"),
        (Attention(1, pos_encoding_mode="ROPE_LLAMA"), "pos_encoding_mode"),
        (Attention(1, qk_head_dim=576, v_head_dim=512), "is (576, 512); allowed is at most 512 each"),
        (Attention(1, tp_v_head_num=1), "is (2, 1); allowed is as many of both"),
    ],
)
def test_layers_are_refused(second: Attention, complaint: str) -> None:
    with pytest.raises(Refused) as refusal:
        check_layers([Attention(0), second], nn.Module())
    assert complaint in str(refusal.value)


def test_layers_without_a_kv_cache_lie_between() -> None:
    layers = [Attention(3), Attention(7)]
    check_layers(layers, nn.Module(), cached=[3, 7])
    with pytest.raises(Refused, match=r"layer 7: layer_id is 7; allowed is 5"):
        check_layers(layers, nn.Module(), cached=[3, 5])
    with pytest.raises(Refused, match=r"its number of attention layers is 2; allowed is 3, as its configuration says"):
        check_layers(layers, nn.Module(), cached=[3, 7, 11])


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(Refused, match="Linear has no attention layer of SGLang's"):
        check_layers([], nn.Linear(1, 1))


@pytest.mark.parametrize(("window", "served"), [(63, True), (0, True), (64, False), (-1, False), (None, False)])
def test_layers_whose_pages_are_freed_see_no_further(window: int | None, served: bool) -> None:
    layers = [Attention(2, sliding_window_size=window)]
    if served:
        check_windows(layers, kept_tokens=63)
        return
    with pytest.raises(Refused, match=f"layer 2: its window is {window}; allowed is at most 63, .*; add --disable-hyb"):
        check_windows(layers, kept_tokens=63)
