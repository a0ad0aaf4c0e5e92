"""DeltaStoreCache: what generate gets from it, what bytes it holds, how many."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.gemma3 import Gemma3ForCausalLM

from deltastore_kernels import ops
from deltastore_kernels.basis import Basis
from deltastore_kernels.layout import RAW, TILE_TOKENS, Format
from sglang_deltastore.lab.cache import DeltaStoreCache
from sglang_deltastore.lab.collecting import collecting
from sglang_deltastore.lab.support import attention_shape
from sglang_deltastore.policy.calibration import Calibration, CalibrationError, cached_path, fingerprint
from sglang_deltastore.policy.tiers import ADAPTIVE, TIERS, Tier
from sglang_deltastore.store.pages import PageStore
from sglang_deltastore.store.size import StoreSize
from sglang_deltastore.store.writes import plan_writes
from tests.lab import tiny

LENGTHS = (1, 15, 16, 17, 97)
RAW_TIER = Tier("raw", "", RAW)
K4V3 = Tier("k4v3", "", Format(4, 3))


def fed(tier: str | Tier, key: torch.Tensor, value: torch.Tensor, steps: list[int], **options: object) -> tuple:
    """A cache that got every layer's tokens in steps, and what the last layer's last step returned."""
    cache = DeltaStoreCache(tiny.config(key.shape[-1]), tier, **options)
    seen: tuple = ()
    begin = 0
    for step in steps:
        rows = slice(begin, begin + step)
        for layer in range(tiny.LAYERS):
            seen = cache.update(key[:, :, rows], value[:, :, rows], layer)
        begin += step
    return cache, seen


def generated(model: PreTrainedModel, ids: torch.Tensor, cache: Cache, **options: object) -> Any:
    """Of a random model, whose every token may be padding or the end by chance."""
    options = {"attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, past_key_values=cache, pad_token_id=0, eos_token_id=None, **options)


@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_raw_generates_as_the_plain_cache_does(tokens: int, head_dim: int) -> None:
    model, ids = tiny.model(head_dim), tiny.token_ids(3, tokens)
    options = {"max_new_tokens": 20, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ours = generated(model, ids, DeltaStoreCache(model.config, RAW_TIER), **options)
    plain = model(ours.sequences).logits[:, tokens - 1 : -1]
    # Keys and values of about 1 rounded to float16, 11 bits, through two layers.
    torch.testing.assert_close(torch.stack(ours.logits, 1), plain, atol=0.02, rtol=0)


@pytest.mark.parametrize("name", TIERS)
def test_packed_tiers_generate_and_stay_near(name: str) -> None:
    model, ids = tiny.model(64), tiny.token_ids(1, 97)
    cache = DeltaStoreCache(model.config, name)
    generated(model, ids, cache, max_new_tokens=8, do_sample=False)
    assert cache.get_seq_length() == 97 + 7  # the last token's keys are never computed


def test_beam_search_follows_its_beams() -> None:
    model, ids = tiny.model(), tiny.token_ids(2, 30)
    options = {"max_new_tokens": 24, "num_beams": 3, "do_sample": False}
    plain = generated(model, ids, DynamicCache(), **options)
    assert torch.equal(plain, generated(model, ids, DeltaStoreCache(model.config, RAW_TIER), **options))


def test_padded_batches_read_what_their_masks_show() -> None:
    model, ids = tiny.model(), tiny.token_ids(2, 21)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
    plain = generated(model, ids, DynamicCache(), **options)
    assert torch.equal(plain, generated(model, ids, DeltaStoreCache(model.config, RAW_TIER), **options))


@torch.inference_mode()
def test_each_sequence_of_a_batch_has_its_sink() -> None:
    """Short ones, too: equal prompts get equal answers, and those that one alone gets."""
    model = tiny.model()
    ids = tiny.token_ids(1, 48)

    def logits(rows: int) -> torch.Tensor:
        cache = DeltaStoreCache(model.config, "conservative", quantize_at_once=True)
        return model(ids.repeat(rows, 1), past_key_values=cache, use_cache=True).logits

    together, alone = logits(4), logits(1)
    for row in together:
        torch.testing.assert_close(row, alone[0], rtol=1e-4, atol=1e-5)


def test_sliding_windows_are_the_masks_business() -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        intermediate_size=64, vocab_size=100, sliding_window=8, initializer_range=0.2,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model, ids = Gemma3ForCausalLM(config).eval(), tiny.token_ids(1, 33)
    assert attention_shape(config).windows == [8, None]
    options = {"max_new_tokens": 20, "do_sample": False}
    plain = generated(model, ids, DynamicCache(config=config), **options)
    assert torch.equal(plain, generated(model, ids, DeltaStoreCache(config, RAW_TIER), **options))


@pytest.mark.parametrize(("page_tokens", "kernels"), [(16, "auto"), (64, "reference")])
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("name", TIERS)
def test_bytes_are_those_the_server_writes(name: str, tokens: int, page_tokens: int, kernels: str) -> None:
    """The server's path, also on the reference operations: rotate, plan, PageStore.write, all at once; the
    cache gets the tokens in steps."""
    key, value = tiny.keys_and_values(3, tokens, 64)
    steps = [part for part in (tokens // 2, 1, tokens - tokens // 2 - 1) if part > 0]
    cache, _ = fed(name, key, value, steps, page_tokens=page_tokens, kernels=kernels)

    layouts = tuple(TIERS[name].layouts([tiny.HEADS] * tiny.LAYERS, 64, page_tokens))
    pages_each = -(-tokens // page_tokens)
    served = PageStore(StoreSize(layouts, 3, 0), 3 * pages_each, "cpu", ops.load(kernels))
    bases = getattr(served, "bases", None) or [Basis(served.ops)] * tiny.LAYERS
    page_table = 1 + torch.arange(3 * pages_each).view(3, pages_each)
    each = torch.full((3,), tokens)
    own = 1 + torch.arange(3)
    plan = plan_writes(torch.zeros_like(each), each, own, page_table, page_tokens, sink_ids=own)
    rows = [side.transpose(1, 2).flatten(0, 1) for side in (key, value)]
    for layer in range(tiny.LAYERS):
        served.write(layer, bases[layer].rotate_key(rows[0]), bases[layer].rotate_value(rows[1]), plan)
        whole = tokens // TILE_TOKENS
        for sequence in range(3):
            ours = cache.pages.store.pages[layer][cache.pages.page_table(pages_each)[sequence]]
            theirs = served.pages[layer][page_table[sequence]]
            for offset, tile_bytes in layouts[layer].field_offsets_bytes.values():
                end = offset + tiny.HEADS * layouts[layer].tiles * tile_bytes
                ours_tiles, theirs_tiles = (
                    pages[:, offset:end].unflatten(1, (tiny.HEADS, layouts[layer].tiles, tile_bytes))
                    .transpose(1, 2).flatten(0, 1)[:whole]
                    for pages in (ours, theirs)
                )  # fmt: skip
                assert torch.equal(ours_tiles, theirs_tiles)
            rest = tokens % TILE_TOKENS
            for side in ("key_rot", "value_rot"):
                ours_frame, theirs_frame = (
                    getattr(store, f"frame_{side}")[layer][sequence + 1, :, :rest]
                    for store in (cache.pages.store, served)
                )
                assert torch.equal(ours_frame, theirs_frame)
        for side in ("sink_key_rot", "sink_value_rot"):
            ours_sinks, theirs_sinks = (getattr(store, side)[layer][1:4] for store in (cache.pages.store, served))
            assert torch.equal(ours_sinks, theirs_sinks)


def test_new_tokens_see_the_stored_decoded_and_themselves_raw() -> None:
    key, value = tiny.keys_and_values(2, 40)
    _, (key_seen, value_seen) = fed(K4V3, key, value, [20, 20])
    for seen, given in ((key_seen, key), (value_seen, value)):
        assert torch.equal(seen[:, :, 20:], given[:, :, 20:])
        difference = (seen - given).abs().amax((0, 1, 3))
        assert (difference[1:16] > 0.05).all()  # packed; the first token is the sink
        assert (difference[16:20] < 0.005).all()  # in the frame, float16


def test_one_new_token_is_read_from_the_store() -> None:
    """As the server's decode: when it completes a tile, even the token itself is read packed."""
    key, value = tiny.keys_and_values(1, 48)
    _, (waiting, _) = fed(K4V3, key, value, [46, 1])
    _, (packed, _) = fed(K4V3, key, value, [46, 1, 1])
    assert 0 < (waiting[:, :, 46] - key[:, :, 46]).abs().max() < 0.005
    assert (packed[:, :, 47] - key[:, :, 47]).abs().max() > 0.05


@pytest.mark.parametrize("tokens", LENGTHS)
def test_at_once_quantizes_every_token_also_of_the_unfinished_tile(tokens: int) -> None:
    key, value = tiny.keys_and_values(2, tokens)
    _, at_once = fed(K4V3, key, value, [tokens], quantize_at_once=True)
    whole = -(-tokens // 16) * 16
    lanes = torch.arange(whole).clamp_max(tokens - 1)
    _, padded = fed(K4V3, key[:, :, lanes], value[:, :, lanes], [whole], quantize_at_once=True)
    for seen, expected, given in zip(at_once, padded, (key, value), strict=True):
        assert torch.equal(seen, expected[:, :, :tokens])
        difference = (seen - given).abs().amax((0, 1, 3))
        assert difference[0] < 0.005, "the sink is float16"
        assert (difference[1:] > 0.02).all()


def test_at_once_leaves_the_bytes_of_whole_tiles_as_they_are() -> None:
    key, value = tiny.keys_and_values(2, 48)
    stepwise, _ = fed(K4V3, key, value, [20, 1, 27], quantize_at_once=True)
    at_once, _ = fed(K4V3, key, value, [48])
    for ours, theirs in zip(stepwise.pages.store.pages, at_once.pages.store.pages, strict=True):
        assert torch.equal(ours[1:7, :932], theirs[1:7, :932])  # 2 heads of 16 * 32 * 7 / 8 + 18 bytes


@pytest.mark.parametrize(("name", "tokens"), [("raw", 15), ("conservative", 97)])
def test_resident_bytes_are_all_that_is_held(name: str, tokens: int) -> None:
    """Against the collector's list of living tensors."""
    key, value = tiny.keys_and_values(3, tokens)
    fed(name, key, value, [tokens])  # constants of the kernels come to life here, not below
    gc.collect()
    before = {id(x) for x in gc.get_objects() if issubclass(type(x), torch.Tensor)}
    cache, seen = fed(name, key, value, [tokens])
    del seen
    gc.collect()
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for x in gc.get_objects()
        if issubclass(type(x), torch.Tensor) and id(x) not in before
    }
    assert cache.resident_bytes() == sum(storages.values())


def test_ratio_and_bytes_in_use_by_hand() -> None:
    """40 tokens, 2 layers, 2 heads of 32, K3V2: two tiles of 16 * 32 * 5 / 8 + 16 + 2 bytes a head, a frame, and the
    first token raw once more."""
    key, value = tiny.keys_and_values(1, 40)
    cache, _ = fed("conservative", key, value, [40])
    page_bytes = -(-2 * (320 + 18) // 16) * 16
    frame_bytes = 16 * 2 * 32 * 2 * 2
    assert cache.raw_bytes() == 40 * 2 * 2 * 32 * 2 * 2
    sink_bytes = 2 * 32 * 2 * 2
    assert cache.bytes_in_use() == 2 * (2 * page_bytes + frame_bytes + sink_bytes)
    # With the free third page, page 0, frame 0 and sink 0 that belong to nobody, and 8 bytes a frame for its sink.
    assert cache.resident_bytes() == 2 * (4 * page_bytes + 2 * frame_bytes + 2 * sink_bytes) + 2 * 8
    assert cache.ratio() == cache.raw_bytes() / cache.resident_bytes()


def test_pages_survive_growth_and_selection() -> None:
    key, value = tiny.keys_and_values(3, 200)
    cache, _ = fed(RAW_TIER, key, value, [33, *[1] * 30, 100])
    cache.batch_select_indices(torch.tensor([2, 0, 0, 1]))
    new_key, new_value = tiny.keys_and_values(4, 2, seed=1)
    seen = cache.update(new_key, new_value, 0)
    for got, given in zip(seen, (key, value), strict=True):
        expected = given[[2, 0, 0, 1], :, :163]
        torch.testing.assert_close(got[:, :, :163], expected, atol=4e-3, rtol=0)
    cache.batch_repeat_interleave(2)
    assert cache.pages.batch == 8


def test_reset_forgets_everything() -> None:
    key, value = tiny.keys_and_values(1, 20)
    cache, _ = fed("lossless", key, value, [20])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.resident_bytes() == 0
    again, _ = cache.update(key, value, 0)
    assert torch.equal(again, key)


def test_bfloat16_models_get_bfloat16() -> None:
    key, value = (side.bfloat16() for side in tiny.keys_and_values(1, 20))
    _, seen = fed(K4V3, key, value, [19, 1])
    assert {side.dtype for side in seen} == {torch.bfloat16}


@pytest.mark.parametrize("again", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("tokens", [0, 5, 37])
def test_a_cache_goes_on_from_its_copy(tokens: int, again: Callable[[Cache], Cache]) -> None:
    """With pages, frames and raw sinks; what one of them stores later, the other does not see."""
    model, ids = tiny.model(), tiny.token_ids(2, tokens + 20)
    cache = DeltaStoreCache(model.config, "k4v2", calibration=calibrated(model))
    with torch.inference_mode():
        if tokens:
            model(ids[:, :tokens], past_key_values=cache)
        copied = again(cache)
        model(1 + ids[:, tokens:] % 50, past_key_values=again(copied))
        ours, theirs = (model(ids[:, tokens:], past_key_values=each).logits for each in (cache, copied))
    assert torch.equal(ours, theirs)
    assert copied.bytes_in_use() == cache.bytes_in_use()


def calibrated(model: PreTrainedModel) -> Calibration:
    with torch.inference_mode(), collecting(model) as moments:
        model(tiny.token_ids(1, 200, seed=9), use_cache=False)
    return Calibration("", tuple(layer.fit().basis for layer in moments), {})


def test_a_calibration_is_given_as_to_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, "auto" or "none": what is read is what the object itself gives."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, file = tmp_path / "model", tmp_path / "made.safetensors"
    tiny.model().save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    made = replace(calibrated(model), fingerprint=fingerprint(folder))
    made.save(file)

    def logits(calibration: object) -> torch.Tensor:
        cache, ids = DeltaStoreCache(model.config, calibration=calibration), tiny.token_ids(1, 40)
        with torch.inference_mode():
            model(ids, past_key_values=cache)
            return model(ids[:, :8], past_key_values=cache).logits

    plain, wanted = logits(None), logits(made)
    assert not torch.equal(plain, wanted)
    assert torch.equal(logits("none"), plain) and torch.equal(logits("auto"), plain)
    made.save(cached_path(made.fingerprint))
    for calibration in ("auto", file, str(file)):
        assert torch.equal(logits(calibration), wanted)
    with pytest.raises(CalibrationError, match="cannot be read"):
        logits(tmp_path / "missing.safetensors")
    replace(made, fingerprint="another").save(file)
    with pytest.raises(CalibrationError, match="made for a model with fingerprint another"):
        logits(file)
    unsaved = tiny.config()
    assert DeltaStoreCache(unsaved, calibration="auto").pages.key_bases is None
    with pytest.raises(CalibrationError, match="folder"):
        DeltaStoreCache(unsaved, calibration=file)


def test_crop_is_refused() -> None:
    key, value = tiny.keys_and_values(1, 20)
    cache, _ = fed(K4V3, key, value, [20])
    cache.crop(0)
    assert not cache.is_croppable
    with pytest.raises(NotImplementedError, match="cannot be taken back"):
        cache.crop(-1)


def test_another_batch_is_refused() -> None:
    key, value = tiny.keys_and_values(2, 20)
    cache, _ = fed(K4V3, key, value, [20])
    with pytest.raises(ValueError, match="a batch of 1 sequences; this cache holds 2"):
        cache.update(key[:1], value[:1], 0)


def test_other_shapes_than_the_configuration_are_refused() -> None:
    key, value = tiny.keys_and_values(1, 20, head_dim=64)
    with pytest.raises(ValueError, match=r"keys .*\(2, 64\).*promises \(2, 32\)"):
        DeltaStoreCache(tiny.config(32), K4V3).update(key, value, 0)


def test_unknown_tiers_are_refused() -> None:
    with pytest.raises(ValueError, match="k9v9: unknown tier; known are raw, lossless"):
        DeltaStoreCache(tiny.config(), "k9v9")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 576}, "head_dim is 576; allowed is at most 512"),
        ({"kv_lora_rank": 512}, "kv_lora_rank is 512; allowed is none"),
        ({"num_kv_shared_layers": 1}, "num_kv_shared_layers is 1; allowed is 0"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is True; allowed is a decoder-only model"),
        ({"layer_types": ["full_attention", "linear_attention"]}, r"layer_types is \['linear_attention'\]"),
        ({"layer_types": ["chunked_attention", "full_attention"]}, r"layer_types is \['chunked_attention'\]"),
    ],
)
def test_unsupported_models_are_refused(changes: dict[str, object], message: str) -> None:
    config = LlamaConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, head_dim=32)
    for name, setting in changes.items():
        object.__setattr__(config, name, setting)
    with pytest.raises(ValueError, match=message + ".*without DeltaStore's cache"):
        DeltaStoreCache(config)


def test_a_tier_with_levels_stores_what_pages_are_once_they_have_given_up_bits() -> None:
    key, value = tiny.keys_and_values(2, 70, 64)
    caches = [fed(tier, key, value, [33, 37], page_tokens=32)[0] for tier in ("lossless", "conservative", ADAPTIVE)]
    finer, plain, sunk = (cache.store for cache in caches)
    assert [layout.format for layout in sunk.layouts] == [layout.format for layout in plain.layouts]
    pages = torch.arange(len(sunk.pages[0]))[1:5]  # whole ones: two of each sequence
    for layer in range(tiny.LAYERS):
        tiles = [
            side.unflatten(2, (2, 16)).transpose(1, 2).flatten(0, 1)
            for side in finer.ops.decode(finer.pages[layer], pages, finer.layouts[layer])
        ]
        twin = torch.zeros_like(sunk.pages[layer])
        where = pages.repeat_interleave(2), torch.arange(2).repeat(len(pages))
        finer.ops.encode(*tiles, *where, twin, sunk.layouts[layer])
        assert torch.equal(sunk.pages[layer][pages, :-16], twin[pages, :-16]), "padding is left as it was"
        assert not torch.equal(sunk.pages[layer][pages], plain.pages[layer][pages])
