"""Schedules and importance, against figures worked out by hand; and eviction in the cache."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import DynamicCache

from deltastore_kernels.layout import RAW, Format
from sglang_deltastore.lab.attention import attend
from sglang_deltastore.lab.cache import DeltaStoreCache
from sglang_deltastore.lab.evicting import Eviction
from sglang_deltastore.lab.eviction import (
    Adaptive,
    Even,
    Importance,
    PreserveEarly,
    concentration,
    keep_top,
    kept_tokens,
    protect,
)
from sglang_deltastore.lab.published import absmax
from sglang_deltastore.lab.simulated import SimulatedCache
from sglang_deltastore.policy.tiers import Tier
from tests.lab import tiny

RAW_TIER = Tier("raw", "", RAW)
K3V2 = Tier("k3v2", "", Format(3, 2))


# --- schedules ---


def test_preserve_early_by_hand() -> None:
    # 10 layers: 0.2 * 10 = 2 keep all; the other 8 fall from 0.70 to 0.30 in 7 steps.
    expected = [1, 1, 0.7, 0.7 - 0.4 / 7, 0.7 - 0.8 / 7, 0.7 - 1.2 / 7, 0.7 - 1.6 / 7, 0.7 - 2 / 7, 0.7 - 2.4 / 7, 0.3]
    assert PreserveEarly(0.3).shares(10) == pytest.approx(expected)
    assert PreserveEarly(0.3).shares(12)[:4] == pytest.approx([1, 1, 1, 0.7])  # layer 2 < 2.4


@pytest.mark.parametrize(("base", "mean"), [(0.5, 0.68), (0.3, 0.60), (0.1, 0.52), (0.05, 0.50)])
def test_preserve_early_means(base: float, mean: float) -> None:
    assert sum(PreserveEarly(base).shares(30)) / 30 == pytest.approx(mean)


def test_adaptive_keeps_the_mean_and_follows_the_spread() -> None:
    spread = [0.5] * 2 + [0.1, 0.2, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4]
    shares = Adaptive(0.3).shares(10, spread)
    assert sum(shares) == pytest.approx(sum(PreserveEarly(0.3).shares(10)))
    assert shares[:2] == [1, 1]
    assert shares[3] == pytest.approx(2 * shares[2])
    assert shares[5] == pytest.approx(3 * shares[2])


def test_adaptive_gives_no_layer_more_than_all() -> None:
    # The last 8 shares sum to 4; in proportion, the widest would get 4 * 0.9 / 1.6 = 2.25.
    shares = Adaptive(0.3).shares(10, [1, 1, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    assert shares == pytest.approx([1, 1, 1, *[3 / 7] * 7])


def test_adaptive_needs_every_layers_spread() -> None:
    with pytest.raises(ValueError, match="spread of all 10 layers; got 3"):
        Adaptive(0.3).shares(10, [1, 1, 1])


@pytest.mark.parametrize("schedule", [PreserveEarly, Adaptive])
@pytest.mark.parametrize("base", [0, 0.71, -1])
def test_bases_out_of_range_are_refused(schedule: type, base: float) -> None:
    with pytest.raises(ValueError, match=r"above 0 and at most 0\.7"):
        schedule(base)


def test_even_shares() -> None:
    assert Even(0.6).shares(3) == [0.6, 0.6, 0.6]
    for share in (0, 1.1):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            Even(share)


def test_concentration_by_hand() -> None:
    # Two heads; together 10, 70, 15, 5: the two largest hold 85, three hold 95 of 100.
    received = torch.tensor([[[5.0, 35, 15, 5], [5, 35, 0, 0]]])
    assert concentration(received) == 0.75
    assert concentration(torch.ones(1, 1, 10)) == pytest.approx(0.9)


def test_kept_tokens_are_whole_tiles_of_the_schedules_mean() -> None:
    assert kept_tokens([1.0, 0.6, 0.6, 0.6, 0.6], 64) == [64, 32, 48, 32, 48]
    kept = kept_tokens(PreserveEarly(0.3).shares(30), 64)
    assert set(kept) <= {16, 32, 48, 64}
    assert sum(kept) / 30 / 64 == pytest.approx(0.60, abs=0.5 / 30 / 4)
    assert kept_tokens([0.01, 1.0], 64) == [16, 48]  # at least a tile; what was too much is taken back


# --- importance ---


def test_importance_by_hand() -> None:
    # B 1, H 1, G 2, Q 2, T 3
    weights = torch.tensor([[[[[1.0, 0, 0], [0.5, 0.5, 0]], [[0.8, 0.1, 0.1], [0.0, 0.2, 0.8]]]]])
    value = torch.tensor([[[[3.0, 4], [0, 2], [1, 0]]]])
    assert Importance().of(weights, value).flatten().tolist() == pytest.approx([2.3, 0.8, 0.9])
    assert Importance(last_queries=1).of(weights, value).flatten().tolist() == pytest.approx([0.5, 0.7, 0.8])
    assert Importance(by_value_norm=True).of(weights, value).flatten().tolist() == pytest.approx([11.5, 1.6, 0.9])
    assert Importance(pool_tokens=3).of(weights, value).flatten().tolist() == pytest.approx([2.3, 2.3, 0.9])


def test_the_first_and_last_tokens_come_ahead() -> None:
    importance = torch.tensor([[[0.0, 0, 9, 8, 7, 0, 0, 0]]])
    guarded = protect(importance, first_tokens=2, last_tokens=3)
    assert keep_top(guarded, 5).flatten().tolist() == [0, 1, 5, 6, 7]
    assert keep_top(guarded, 6).flatten().tolist() == [0, 1, 2, 5, 6, 7]
    assert keep_top(guarded, 1).flatten().tolist() == [0]
    assert keep_top(importance, 2).flatten().tolist() == [2, 3]


# --- in the cache ---


def evicting(tier: Tier, shares: tuple[float, ...] = (1.0, 0.5), page_tokens: int = 32, **options: object) -> tuple:
    model = tiny.evicting_model()
    return model, DeltaStoreCache(model.config, tier, page_tokens, eviction=Eviction(shares, **options))


@torch.inference_mode()
def test_nothing_evicted_is_the_plain_cache() -> None:
    model, cache = evicting(RAW_TIER, (1.0, 1.0))
    ids = tiny.token_ids(2, 150)
    seen = torch.cat([model(part, past_key_values=cache).logits for part in ids.split([70, 1, 1, 78], 1)], 1)
    torch.testing.assert_close(seen, model(ids).logits, atol=0.02, rtol=0)


@torch.inference_mode()
def test_kept_tokens_are_each_heads_most_important_of_their_page() -> None:
    """Against attention computed by the model itself."""
    model, cache = evicting(RAW_TIER, first_tokens=0, last_tokens=0)
    ids = tiny.token_ids(1, 100)
    model(ids, past_key_values=cache)
    model.set_attn_implementation("eager")
    plain = model(ids, output_attentions=True)
    received = plain.attentions[1].unflatten(1, (tiny.HEADS, -1)).sum((2, 3))  # [1, H, 100]
    key = plain.past_key_values.layers[1].keys
    layer = cache.layers[1]
    assert (layer.pages_done, layer.tail_key_rot.shape[2]) == (3, 4)
    rotated = cache.pages.read(1, 48)
    stored, _ = cache.pages.restore(1, *rotated, torch.float32)
    for page in range(3):
        for head in range(tiny.HEADS):
            best = received[0, head, page * 32 :][:32].topk(16).indices.sort().values + page * 32
            expected = key[0, head, best]
            torch.testing.assert_close(stored[0, head, page * 16 :][:16], expected, atol=4e-3, rtol=0)


@torch.inference_mode()
def test_queries_see_the_kept_the_waiting_and_themselves() -> None:
    """Against attention over all keys with a mask, also where a window hides some of the kept."""
    model, _ = evicting(RAW_TIER)
    model.config.layer_types, model.config.sliding_window = ["full_attention", "sliding_attention"], 80
    cache = DeltaStoreCache(model.config, RAW_TIER, 32, eviction=Eviction((1.0, 0.5)))
    model(tiny.token_ids(1, 100), past_key_values=cache)
    plain = DynamicCache()
    model(tiny.token_ids(1, 100), past_key_values=plain)
    key, value = tiny.keys_and_values(1, 5)
    query = torch.randn(1, 4, 5, 32)
    shown = torch.arange(105) > torch.arange(100, 105)[:, None] - 80  # the window
    shown &= torch.arange(105) <= torch.arange(100, 105)[:, None]
    mask = torch.where(shown, 0.0, -1e9)[None, None]
    layer = cache.layers[1]
    kept_key, kept_value = layer.update(key, value)
    positions = layer.positions()[0]
    out, _ = attend(model.model.layers[1].self_attn, query, kept_key, kept_value, mask)

    all_key, all_value = plain.update(key, value, 1)
    for head in range(4):
        hidden = torch.ones(105, dtype=torch.bool)
        hidden[positions[head // 2]] = False
        assert hidden.sum() == 48
        scores = query[0, head] @ all_key[0, head // 2].T * 32**-0.5 + mask[0, 0]
        expected = scores.masked_fill(hidden, -1e9).softmax(-1) @ all_value[0, head // 2]
        torch.testing.assert_close(out[0, :, head], expected, atol=4e-3, rtol=0)


@torch.inference_mode()
def test_bytes_by_hand() -> None:
    """100 tokens in pages of 32, kept 32 and 16: three pages of 2 and of 1 tiles for 2 heads, 4 tokens raw."""
    model, cache = evicting(K3V2)
    model(tiny.token_ids(1, 100), past_key_values=cache)
    tile_bytes = 16 * 32 * 5 // 8 + 18
    two_tiles, one_tile = (-(-2 * tiles * tile_bytes // 16) * 16 for tiles in (2, 1))
    tail_bytes = 2 * 4 * 32 * 2 * 2 + 2 * 4 * 4  # keys and values float16, importance float32
    sink_bytes = 2 * 32 * 2 * 2  # the first token, raw once more
    assert cache.bytes_in_use() == 3 * (two_tiles + one_tile) + 2 * (tail_bytes + sink_bytes)
    assert cache.raw_bytes() == 100 * 2 * 2 * 32 * 2 * 2


@torch.inference_mode()
def test_resident_bytes_are_all_that_is_held() -> None:
    model, warm = evicting(K3V2)
    model(tiny.token_ids(1, 100), past_key_values=warm)
    gc.collect()
    before = {id(x) for x in gc.get_objects() if issubclass(type(x), torch.Tensor)}
    cache = DeltaStoreCache(model.config, K3V2, 32, eviction=Eviction((1.0, 0.5)))
    model(tiny.token_ids(1, 100), past_key_values=cache)
    gc.collect()
    new = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and id(x) not in before]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in new if x.nelement()}
    assert cache.resident_bytes() == sum(storages.values())


@torch.inference_mode()
def test_generate_and_beams_run_with_eviction() -> None:
    model, cache = evicting(K3V2)
    ids = tiny.token_ids(2, 50)
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options["attention_mask"] = torch.ones_like(ids)
    model.generate(ids, past_key_values=cache, **options)
    assert cache.get_seq_length() == 79
    assert cache.layers[0].pages_done == 2
    plain = model.generate(ids, num_beams=2, **options)
    beams = DeltaStoreCache(model.config, RAW_TIER, 32, eviction=Eviction((1.0, 1.0)))
    assert torch.equal(plain, model.generate(ids, num_beams=2, past_key_values=beams, **options))


@torch.inference_mode()
def test_windowed_layers_keep_a_byte_for_each_place() -> None:
    model, _ = evicting(K3V2)
    model.config.layer_types, model.config.sliding_window = ["full_attention", "sliding_attention"], 40
    cache = DeltaStoreCache(model.config, RAW_TIER, 32, eviction=Eviction((1.0, 0.5), first_tokens=0, last_tokens=0))
    model(tiny.token_ids(1, 100), past_key_values=cache)
    plain, windowed = cache.layers
    assert plain.places.numel() == 0
    assert windowed.places.numel() == 2 * 3 * 16
    cache.update(*tiny.keys_and_values(1, 5), 1)
    positions = windowed.positions()
    assert positions[0, 0, -9:].tolist() == list(range(96, 105))
    kept = positions[0, 0, :48].view(3, 16)
    assert (kept // 32 == torch.arange(3)[:, None]).all()
    assert (kept[:, 1:] > kept[:, :-1]).all()


@torch.inference_mode()
def test_first_tokens_are_the_contexts_not_each_steps() -> None:
    model, _ = evicting(K3V2)
    model.config.layer_types, model.config.sliding_window = ["full_attention", "sliding_attention"], 400
    cache = DeltaStoreCache(model.config, K3V2, 32, eviction=Eviction((1.0, 0.5), first_tokens=16, last_tokens=0))
    for part in tiny.token_ids(1, 64).split(32, 1):  # a page in each step
        model(part, past_key_values=cache)
    first, second = cache.layers[1].places[0, 0].view(2, 16)
    assert first.tolist() == list(range(16))
    assert second.tolist() != list(range(16))


def test_other_attention_is_refused() -> None:
    model = tiny.model()  # sdpa: tells nobody what tokens received
    cache = DeltaStoreCache(model.config, K3V2, 32, eviction=Eviction((1.0, 0.5)))
    ids = tiny.token_ids(1, 20)
    model(ids, past_key_values=cache)
    with pytest.raises(RuntimeError, match=r"set_attn_implementation\('deltastore'\)"):
        model(ids, past_key_values=cache)


def test_padded_batches_are_refused() -> None:
    model, cache = evicting(K3V2)
    ids = tiny.token_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with pytest.raises(ValueError, match="padded batch"):
        model(ids, attention_mask=mask, past_key_values=cache)


def test_impossible_evictions_are_refused() -> None:
    config = tiny.config()
    with pytest.raises(ValueError, match="shares of 3 layers: the model has 2"):
        DeltaStoreCache(config, K3V2, 32, eviction=Eviction((1.0, 1.0, 1.0)))
    with pytest.raises(ValueError, match="page_tokens=512: allowed are at most 256"):
        DeltaStoreCache(config, K3V2, 512, eviction=Eviction((1.0, 1.0)))
    with pytest.raises(ValueError, match="quantize_at_once with eviction"):
        DeltaStoreCache(config, K3V2, 32, eviction=Eviction((1.0, 1.0)), quantize_at_once=True)


# --- the published method ---


@torch.inference_mode()
@pytest.mark.parametrize("per_head", [False, True])
def test_the_published_method_keeps_the_layers_top_tokens(per_head: bool) -> None:
    model = tiny.evicting_model()
    ids = tiny.token_ids(1, 60)
    cache = SimulatedCache(model.config, absmax(4, 2), shares=[1.0, 0.25], per_head=per_head)
    model(ids[:, :40], past_key_values=cache)
    model.set_attn_implementation("eager")
    received = model(ids[:, :40], output_attentions=True).attentions[1].unflatten(1, (tiny.HEADS, -1)).sum((2, 3))[0]
    if not per_head:
        received = received.sum(0, keepdim=True).expand(tiny.HEADS, -1)
    expected = received.topk(10).indices.sort().values
    assert torch.equal(cache.layers[1].kept[0], expected)
    assert torch.equal(cache.layers[0].kept[0], torch.arange(40).expand(tiny.HEADS, -1))
    # The second step reads those, through the method, and the new tokens raw.
    keys = cache.layers[1].keys
    new = tiny.keys_and_values(1, 20)
    seen, _ = cache.update(*new, 1)
    compressed, _ = absmax(4, 2).apply(1, keys, keys)
    for head in range(tiny.HEADS):
        assert torch.equal(seen[0, head, :10], compressed[0, head, expected[head]])
    assert torch.equal(seen[:, :, 10:], new[0])
    assert cache.layers[1].positions()[0, 0, 10:].tolist() == list(range(40, 60))
