"""Importance from a page's own tokens: by hand, against the model's own queries, and in pages that branches share."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from benchmarks import frontier
from deltastore_kernels.basis import KeyBasis
from deltastore_kernels.layout import Format
from sglang_deltastore.lab.cache import DeltaStoreCache
from sglang_deltastore.lab.collecting import expected_attention
from sglang_deltastore.lab.evicting import Eviction
from sglang_deltastore.lab.eviction import ExpectedAttention
from sglang_deltastore.lab.eviction.expected import DISTANCES, Queries
from sglang_deltastore.lab.quality import measure
from sglang_deltastore.lab.suites import Subject, evicting
from sglang_deltastore.policy.calibration import Calibration
from sglang_deltastore.policy.moments import SKIPPED_TOKENS
from sglang_deltastore.policy.tiers import TIERS, Tier
from tests.lab import tiny

K3V2 = Tier("k3v2", "", Format(3, 2))


@pytest.fixture(scope="module")
def expected() -> ExpectedAttention:
    return expected_attention(tiny.evicting_model(), [tiny.token_ids(1, 200, seed)[0] for seed in (1, 2)])


def test_importance_by_hand() -> None:
    """Dims of one pair that RoPE turns by a quarter a token: all distances but one are whole turns."""

    def turn(x: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
        quarters = (distances % 4)[:, None]
        first, second = x.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
        return torch.where(
            quarters == 0, x, torch.where(quarters == 1, turned, torch.where(quarters == 2, -x, -turned))
        )

    assert {distance % 4 for distance in DISTANCES} == {0}
    queries = Queries(torch.tensor([[2.0, 1.0]]), torch.tensor([[[0.5, 0.0], [0.0, 3.0]]]))
    key = torch.tensor([[[[0.0, 4.0], [4.0, 0.0]]]])  # of positions 1 and 2: before RoPE (4, 0) and (-4, 0)
    value = torch.tensor([[[[3.0, 4.0], [0.0, 1.0]]]])
    found = ExpectedAttention([queries], turn, scaling=0.5).of(0, key, value, first_position=1)
    # half a key: (2, 0) and (-2, 0); 2 * 2 + 2 * 2 * 0.5 / 2 = 5 and -4 + 1 = -3; the values' norms are 5 and 1
    assert found.flatten().tolist() == pytest.approx([5 + 1.6094379, -3.0])


def test_what_is_expected_are_the_models_queries_before_rope(expected: ExpectedAttention) -> None:
    model = tiny.evicting_model()
    attention = model.model.layers[0].self_attn
    queries = []
    for seed in (1, 2):
        hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(tiny.token_ids(1, 200, seed)))
        queries.append(attention.q_proj(hidden)[0, SKIPPED_TOKENS:].unflatten(-1, (tiny.HEADS, -1, 32)))
    by_head = torch.cat(queries).transpose(0, 1).flatten(1, 2)
    torch.testing.assert_close(expected.layers[0].mean, by_head.mean(1), atol=1e-4, rtol=0)
    covariance = torch.stack([head.T.cov(correction=0) for head in by_head])
    torch.testing.assert_close(expected.layers[0].covariance, covariance, atol=1e-4, rtol=0)
    assert expected.scaling == pytest.approx(32**-0.5)


@torch.inference_mode()
def test_scores_are_those_of_queries_so_far_behind(expected: ExpectedAttention) -> None:
    """Queries of no covariance: the mean score of one query, turned by the model to each distance behind the key."""
    mean = expected.layers[1].mean
    fixed = ExpectedAttention([Queries(mean, torch.zeros(2, 32, 32))], expected.turn, expected.scaling)
    key, value = tiny.keys_and_values(1, 6)
    found = fixed.of(0, key, value, first_position=40)
    positions = torch.arange(40, 46)
    scores = [
        (expected.turn(mean[:, None].expand(-1, 6, -1), positions + distance) * key[0]).sum(-1) * 32**-0.5
        for distance in DISTANCES
    ]
    torch.testing.assert_close(found[0], torch.stack(scores).mean(0) + value[0].norm(dim=-1).log(), atol=1e-4, rtol=0)


@torch.inference_mode()
def test_a_page_is_what_its_own_tokens_make_it(expected: ExpectedAttention) -> None:
    """However they arrive, and whatever follows: what branches share."""
    model = tiny.evicting_model()
    ids = tiny.token_ids(1, 128)
    key, value = tiny.keys_and_values(1, 128)
    stored = []
    for parts in ([128], [64, 64], [70, 1, 57], [64]):
        cache = DeltaStoreCache(model.config, TIERS["raw"], 64, eviction=Eviction((1.0, 0.5), expected, 1, 0))
        begin = 0
        for part in parts:
            cache.update(key[:, :, begin : begin + part], value[:, :, begin : begin + part], 1)
            begin += part
        stored.append(cache.pages.read(1, begin // 2)[0])
    for each in stored:
        # Matrix products of other sizes round otherwise.
        torch.testing.assert_close(each, stored[0][:, :, : each.shape[2]], atol=4e-3, rtol=0)
    cache = DeltaStoreCache(model.config, K3V2, 64, eviction=Eviction((1.0, 0.5), expected, 1, 0))
    for part in ids.split([70, 1, 57], 1):
        assert model(part, past_key_values=cache).logits.isfinite().all()
    assert cache.get_seq_length() == 128


def test_models_that_turn_keys_in_two_ways_are_refused() -> None:
    config = Gemma3TextConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        intermediate_size=32, vocab_size=50, layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    with pytest.raises(ValueError, match="one RoPE for all layers is wanted; found full_attention, sliding_attention"):
        expected_attention(Gemma3ForCausalLM(config), [tiny.token_ids(1, 40)[0]])


def test_the_frontiers_rows_are_of_the_ratios_asked_for() -> None:
    model = tiny.evicting_model(64, num_hidden_layers=10)
    plain = [torch.eye(64).expand(tiny.HEADS, -1, -1).contiguous()] * 3
    basis = KeyBasis(torch.zeros(tiny.HEADS, 64), *plain)
    length = frontier.Length(512, 256, 1)
    subject = Subject(model, tiny.token_ids(1, 512), Calibration("", (basis,) * 10, {}))
    expected = expected_attention(model, [tiny.token_ids(1, 100)[0]])
    candidates = list(frontier.candidates(subject, expected, length))
    assert len({candidate.name for candidate in candidates}) == len(candidates)
    assert {candidate.source for candidate in candidates} == {"ours", "published", "peer"}
    asked = [evicting(subject, TIERS["conservative"], ratio, 256, expected, 64) for ratio in frontier.EVICTED_TO]
    rows = measure(model, subject.token_ids, asked, ("continue",))
    for ratio, row in zip(frontier.EVICTED_TO, rows, strict=True):
        assert 0.98 * ratio <= row["ratio"] <= 1.05 * ratio  # a tile of 40 is a fortieth
