"""What is published of keys, values and attention: each figure on tensors and models whose figure is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sglang_deltastore.cli import main
from sglang_deltastore.lab.figures import (
    capture,
    channel_range_ratio,
    correlation,
    evicted,
    eviction_rows,
    head_cosines,
    importance,
    kept_tokens,
    measurements,
    one_for_all_layers,
)

RANDOM = torch.Generator().manual_seed(0)
KEY, VALUE = torch.randn(2, 2, 3, 36, 64, generator=RANDOM)


def test_channel_range_ratio() -> None:
    x = torch.tensor([[0.0, -1], [4, 1]])[None, None]  # ranges 4 and 2
    assert channel_range_ratio(x) == 2


def test_correlation() -> None:
    assert correlation(KEY, 3 * KEY + 1) == pytest.approx(1)
    assert correlation(KEY, -KEY) == pytest.approx(-1)


def test_head_cosines() -> None:
    first = torch.randn(1, 1, 5, 4, generator=RANDOM)
    layer = torch.cat((first, 2 * first, -first), 1)
    assert sorted(head_cosines([layer])) == pytest.approx([-1, -1, 1])


def test_measurements_of_one_head_have_no_pair() -> None:
    rows = {row["figure"]: row["value"] for row in measurements([(KEY[:, :1], VALUE[:, :1])] * 2)}
    assert rows["largest cosine of two KV heads' keys"] is None
    assert rows["correlation of neighbouring layers' keys, mean size"] == pytest.approx(1)
    assert rows["size of neighbouring layers' delta of values to the original's, mean"] == 0


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
        initializer_range=0.5,  # attention with peaks, in other places in each layer
    )
    return LlamaForCausalLM(config).eval()


def test_importance_sums_over_heads_and_queries() -> None:
    weights = torch.tensor([[[[1.0, 0], [0.5, 0.5]], [[1, 0], [0.2, 0.8]]]])  # [1, 2 heads, 2 queries, 2 tokens]
    torch.testing.assert_close(importance([weights]), torch.tensor([[[2.7, 1.3]]]))


def test_kept_tokens_are_each_layers_own_or_the_same_for_all() -> None:
    importances = torch.tensor([[[5.0, 1, 2, 0]], [[0, 6, 1, 1.5]]])
    assert kept_tokens(importances, 0.5).int().tolist() == [[[1, 0, 1, 0]], [[0, 1, 0, 1]]]
    same = kept_tokens(one_for_all_layers(importances), 0.5)
    assert same.int().tolist() == [[[1, 1, 0, 0]]] * 2
    assert kept_tokens(importances, 0.01).sum((1, 2)).tolist() == [1, 1]


def test_evicting_is_the_same_as_never_having_had_the_token(model: LlamaForCausalLM) -> None:
    """One layer's keys of the evicted tokens, replaced by anything, change nothing behind the prefix."""
    ids = torch.arange(20)[None]
    keep = torch.ones(2, 1, 10, dtype=torch.bool)
    keep[0, 0, [2, 5]] = False
    layers = [layer.self_attn for layer in model.model.layers]

    def logits(disturb: bool) -> torch.Tensor:
        handle = layers[0].k_proj.register_forward_hook(
            lambda module, args, out: out.index_fill(1, torch.tensor([2, 5]), 3.0) if disturb else None
        )
        try:
            with torch.inference_mode(), evicted(layers[:1], keep[:1]):
                return model(ids, use_cache=False).logits
        finally:
            handle.remove()

    plain, disturbed = logits(False), logits(True)
    # the prefix itself still saw them, and layer 1 reads the prefix: compare layer 0's effect alone
    with torch.inference_mode():
        unevicted = model(ids, use_cache=False).logits
    torch.testing.assert_close(plain[:, :10], unevicted[:, :10])
    assert not torch.allclose(plain[:, 10:], unevicted[:, 10:], atol=1e-4)
    assert not torch.allclose(disturbed[:, 2:10], plain[:, 2:10], atol=1e-4)


def test_hooks_are_gone_after_an_error(model: LlamaForCausalLM) -> None:
    layers = [layer.self_attn for layer in model.model.layers]
    with pytest.raises(RuntimeError), evicted(layers, torch.ones(2, 1, 4, dtype=torch.bool)):
        raise RuntimeError
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_eviction_rows(model: LlamaForCausalLM) -> None:
    ids = torch.randint(64, (2, 32), generator=RANDOM)
    all_kept, _, half, half_for_all, tenth, _ = eviction_rows(model, ids, shares=(1.0, 0.5, 0.1))
    assert half["figure"] == "KL with 50% of the prefix kept, each layer its own"
    assert half_for_all["figure"] == "KL with 50% of the prefix kept, one choice for all layers"
    assert all_kept["value"] == pytest.approx(0, abs=1e-6)
    assert 0 < half["value"] < tenth["value"]
    assert half_for_all["value"] not in (0, half["value"])


def test_eviction_needs_readable_weights(model: LlamaForCausalLM) -> None:
    model.set_attn_implementation("sdpa")
    try:
        with pytest.raises(ValueError, match="'eager'"):
            eviction_rows(model, torch.arange(8)[None])
    finally:
        model.set_attn_implementation("eager")


def test_capture(model: LlamaForCausalLM) -> None:
    layers = capture(model, torch.arange(6)[None])
    assert [key.shape for key, _ in layers] == [(1, 2, 6, 16)] * 2
    with torch.inference_mode():
        values = model.model.layers[0].self_attn.v_proj(
            model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.arange(6)[None]))
        )
    torch.testing.assert_close(layers[0][1], values.view(1, 6, 2, 16).transpose(1, 2))


def test_the_command_prints_a_table_and_writes_rows(
    smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, rows_path = tmp_path / "story.txt", tmp_path / "rows.jsonl"
    text.write_text("The quick brown fox jumps over the lazy dog, and comes back by the other way. " * 20)
    line = ["figures", "--model", str(smollm2), "--text", str(text), "--sequences", "1"]
    assert main([*line, "--tokens", "64", "--json", str(rows_path)]) == 0
    rows = {row["figure"]: row for row in map(json.loads, rows_path.read_text().splitlines())}
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "| figure | measured | published |"
    assert len(printed) == 2 + len(rows)
    before, rotated = (f"channel range ratio of keys{which}, median layer" for which in ("", ", rotated"))
    assert rows[before]["value"] > 2 * rows[rotated]["value"] > 2
    assert (rows[before]["claimed"], rows[before]["sequences"], rows[before]["tokens"]) == ("24.9", 1, 64)
    assert main([*line, "--json", str(tmp_path / "nowhere" / "rows.jsonl")]) == 1
    assert "make it first" in capsys.readouterr().err
    assert main([*line, "--tokens", "5000"]) == 1
    assert "give a longer text" in capsys.readouterr().err
