"""The metrics against hand computations, the protocols against the model itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from transformers import Cache, DynamicCache

from deltastore_kernels.basis import fit_key_basis
from deltastore_kernels.layout import RAW, Format
from sglang_deltastore.lab import suites
from sglang_deltastore.lab.candidates import Other, Ours
from sglang_deltastore.lab.evicting import Eviction
from sglang_deltastore.lab.published import absmax
from sglang_deltastore.lab.quality import Scores, grade, measure, measure_in_chunks, passes, sequences
from sglang_deltastore.policy.calibration import Calibration
from sglang_deltastore.policy.tiers import TIERS, Tier
from tests.lab import tiny

RAW_TIER = Tier("raw", "", RAW)
K3V2 = Tier("k3v2", "", Format(3, 2))
BOTH = ("all", "continue")


class Words:
    """A tokenizer of whole numbers."""

    def __init__(self, bos: int | None = None) -> None:
        self.bos_token_id = bos

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        ids = [int(word) for word in text.split()]
        return {"input_ids": ids if self.bos_token_id is None else [self.bos_token_id, *ids]}


@dataclass(frozen=True)
class Halved:
    """A method whose reading is easily told: everything halved."""

    name: str = "halved"
    source: str = "peer"

    def bits_per_value(self, head_dim: int) -> float:
        return head_dim / 8

    def apply(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return key / 2, value / 2


# --- metrics ---


def test_metrics_by_hand() -> None:
    base = torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1], [0.2, 0.3, 0.5]]).log()
    ours = torch.tensor([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1], [0.1, 0.1, 0.8]]).log()
    scores = Scores()
    scores.add(base + 3.0, ours - 1.0, torch.tensor([1, 0]))  # logits: a constant more changes nothing
    kl = [0.5 * math.log(2) - 0.25 * math.log(2), 0, 0.2 * math.log(2) + 0.3 * math.log(3) + 0.5 * math.log(0.625)]
    row = scores.metrics()
    assert row["kl_mean"] == pytest.approx(sum(kl) / 3, rel=1e-5)
    assert row["kl_median"] == pytest.approx(kl[0], rel=1e-5)
    assert row["kl_max"] == pytest.approx(kl[2], rel=1e-5)
    # Between the largest two of three, 0.998 of the way.
    assert row["kl_p999"] == pytest.approx(kl[0] + 0.998 * (kl[2] - kl[0]), rel=1e-5)
    assert row["top1"] == pytest.approx(2 / 3)
    assert row["ppl_base"] == pytest.approx((0.25 * 0.8) ** -0.5, rel=1e-5)
    assert row["ppl"] == pytest.approx((0.5 * 0.8) ** -0.5, rel=1e-5)
    assert row["grade"] == "ACCEPTABLE"


def test_metrics_do_not_depend_on_the_blocks_rows() -> None:
    """150 positions: more than two blocks; 149 of them have a next token."""
    generator = torch.Generator().manual_seed(0)
    base, ours = (torch.randn(150, 40, generator=generator) for _ in range(2))
    ids = torch.randint(0, 40, (149,), generator=generator)
    scores = Scores()
    scores.add(base, ours, ids)
    row = scores.metrics()
    expected = torch.nn.functional.kl_div(
        ours.log_softmax(-1), base.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert row["kl_mean"] == pytest.approx(expected.item(), rel=1e-5)
    assert row["ppl"] == pytest.approx(torch.nn.functional.cross_entropy(ours[:-1], ids).exp().item(), rel=1e-5)
    assert row["ppl_base"] == pytest.approx(torch.nn.functional.cross_entropy(base[:-1], ids).exp().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("kl", "name"),
    [
        (0.0099, "EXCELLENT"),
        (0.01, "GOOD"),
        (0.0499, "GOOD"),
        (0.05, "ACCEPTABLE"),
        (0.2, "MARGINAL"),
        (0.5, "FAILED"),
        (math.nan, "FAILED"),
    ],
)
def test_grades(kl: float, name: str) -> None:
    assert grade(kl) == name


# --- sequences ---


def test_sequences_are_the_texts_own_and_do_not_overlap() -> None:
    text = " ".join(map(str, range(1000)))
    found = sequences(Words(), text, count=6, tokens=150, seed=3)
    assert found.shape == (6, 150)
    assert (found.diff(dim=1) == 1).all()
    assert found.flatten().unique().numel() == 900
    assert torch.equal(found, sequences(Words(), text, count=6, tokens=150, seed=3))
    assert not torch.equal(found, sequences(Words(), text, count=6, tokens=150, seed=4))


def test_sequences_begin_as_the_tokenizer_begins_a_text() -> None:
    found = sequences(Words(bos=7777), " ".join(map(str, range(400))), count=2, tokens=100, seed=0)
    assert found[:, 0].tolist() == [7777, 7777]
    assert (found[:, 1:].diff(dim=1) == 1).all()


def test_a_text_too_short_is_refused_with_what_is_needed() -> None:
    with pytest.raises(ValueError, match="has 299 tokens; 3 sequences of 100 need 300"):
        sequences(Words(), " ".join(["5"] * 299), count=3, tokens=100, seed=0)


# --- protocols ---


@torch.inference_mode()
def test_protocol_all_reads_everything_compressed() -> None:
    """Halving keys and values in the cache is halving the model's key and value projections."""
    model, ids = tiny.evicting_model(), tiny.token_ids(2, 100)
    row = measure(model, ids, [Other("halved", Halved())], ("all",))[0]
    halved = tiny.evicting_model()
    for layer in halved.model.layers:
        layer.self_attn.k_proj.weight.div_(2)
        layer.self_attn.v_proj.weight.div_(2)
    expected = Scores()
    for sequence in ids:
        expected.add(model(sequence[None]).logits[0, 32:], halved(sequence[None]).logits[0, 32:], sequence[33:])
    for key, figure in expected.metrics().items():
        assert row[key] == (pytest.approx(figure, rel=1e-4) if isinstance(figure, float) else figure), key
    assert row["kl_mean"] > 0.01
    assert (row["source"], row["config"], row["bits_per_value"], row["ratio"]) == ("peer", "halved", 4, 4)


@torch.inference_mode()
@pytest.mark.parametrize(("tokens", "new_tokens"), [(100, None), (640, None), (100, 30)])
def test_protocol_continue_reads_the_prefix_compressed_and_the_rest_raw(tokens: int, new_tokens: int | None) -> None:
    """640 tokens: the second half of 320 takes two chunks, the second of which reads the first compressed."""
    model, ids = tiny.evicting_model(), tiny.token_ids(1, tokens)
    row = measure(model, ids, [Other("halved", Halved())], ("continue",), new_tokens=new_tokens)[0]
    cache = DynamicCache()
    half = tokens - (new_tokens or tokens // 2)
    model(ids[:, :half], past_key_values=cache)
    raw = 0
    logits = []
    for chunk in ids[:, half:].split(256, 1):
        for layer in cache.layers:
            layer.keys[:, :, raw:].div_(2)
            layer.values[:, :, raw:].div_(2)
        raw = cache.get_seq_length()
        logits.append(model(chunk, past_key_values=cache).logits[0])
    expected = Scores()
    expected.add(model(ids).logits[0, half:], torch.cat(logits), ids[0, half + 1 :])
    assert row["kl_mean"] == pytest.approx(expected.metrics()["kl_mean"], rel=1e-4)
    assert row["ppl"] == pytest.approx(expected.metrics()["ppl"], rel=1e-4)


class Recorded(Halved):
    """The first layer's keys as they came last."""

    def apply(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer == 0:
            self.key = key
        return key, value


@torch.inference_mode()
@pytest.mark.parametrize("protocol", BOTH)
def test_a_sequence_may_begin_anywhere_in_a_context(protocol: str) -> None:
    model, ids, found = tiny.evicting_model(), tiny.token_ids(1, 100), Recorded()
    (row,) = measure(model, ids, [Other("recorded", found)], (protocol,), first_position=70)
    cache = DynamicCache()
    model(ids, past_key_values=cache, position_ids=torch.arange(70, 170)[None])
    torch.testing.assert_close(found.key, cache.layers[0].keys[:, :, : found.key.shape[2]])
    assert row["kl_mean"] < 1e-5, "what is rounded by nothing predicts the same, chunk by chunk"


@torch.inference_mode()
@pytest.mark.parametrize("protocol", BOTH)
def test_raw_bytes_change_next_to_nothing_and_fewer_bits_change_more(protocol: str) -> None:
    model, ids = tiny.evicting_model(64), tiny.token_ids(2, 128)
    formats = [RAW, Format(4, 3), Format(3, 2)]
    rows = measure(model, ids, [Ours(str(fmt), Tier("", "", fmt)) for fmt in formats], (protocol,))
    kl = [row["kl_mean"] for row in rows]
    assert kl[0] < 1e-5 < 20 * kl[0] + 1e-5 < kl[1] < kl[2]
    assert rows[0]["top1"] > 0.99
    assert rows[0]["ratio"] == 1
    # 8 tiles, each 2 heads of 16 * 64 * 5 / 8 + 18 bytes, 1316, up to 16; and the first token raw once more.
    held_bytes = 8 * 1328 + 2 * 64 * 2 * 2
    assert rows[2]["ratio"] == pytest.approx(128 * 2 * 64 * 2 * 2 / held_bytes)


@torch.inference_mode()
def test_evicting_candidates_run_by_continue_alone() -> None:
    model, ids = tiny.evicting_model(), tiny.token_ids(1, 128)
    shares = (1.0, 0.5)
    candidates = [
        Ours("ours", K3V2, 32, Eviction(shares)),
        Other("published", absmax(4, 2), shares),
        Ours("plain", K3V2),
    ]
    ticks: list[str] = []
    rows = measure(model, ids, candidates, BOTH, ticks.append)
    assert [(row["protocol"], row["config"]) for row in rows] == [
        ("all", "plain"),
        ("continue", "ours"),
        ("continue", "published"),
        ("continue", "plain"),
    ]
    assert len(ticks) == passes(candidates, BOTH) == 5
    published, ours, plain = rows[2], rows[1], rows[3]
    assert published["bits_per_value"] == pytest.approx(0.75 * absmax(4, 2).bits_per_value(32))
    assert ours["kl_mean"] > plain["kl_mean"]
    assert ours["bits_per_value"] == pytest.approx(0.75 * plain["bits_per_value"], rel=0.05)


def test_measuring_is_deterministic() -> None:
    model, ids = tiny.evicting_model(), tiny.token_ids(2, 96)
    candidates = [Ours("k3v2", K3V2), Other("absmax", absmax(4, 2))]
    assert measure(model, ids, candidates, BOTH) == measure(model, ids, candidates, BOTH)


def test_a_method_of_other_shapes_is_refused() -> None:
    class Short(Halved):
        def apply(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return key[:, :, 1:], value

    with pytest.raises(ValueError, match="halved: apply made keys"):
        measure(tiny.evicting_model(), tiny.token_ids(1, 64), [Other("short", Short())], ("all",))


# --- suites ---


@pytest.fixture(scope="module")
def subject() -> suites.Subject:
    return suites.Subject(tiny.evicting_model(64), tiny.token_ids(1, 512))


def test_the_claims_suite_sets_ours_at_the_claimed_ratio_beside_each_published_row() -> None:
    subject = suites.Subject(tiny.evicting_model(64, num_hidden_layers=10), tiny.token_ids(1, 256))
    candidates = suites.claims(subject)
    assert len(suites.CLAIMS) == 12
    assert [candidate.source for candidate in candidates] == ["published", "ours"] * 12
    rows = {row["config"]: row for row in measure(subject.model, subject.token_ids, candidates, ("continue",))}
    assert len(rows) == 24  # no two of a name
    for claim, theirs, ours in zip(suites.CLAIMS, candidates[::2], candidates[1::2], strict=True):
        # Whole tiles of ten layers come within two hundredths. Without eviction the raw first token weighs in 256.
        assert rows[ours.name]["ratio"] >= (0.98 if claim.schedule else 0.97) * claim.claimed_ratio, claim.name
        assert rows[theirs.name]["ratio"] < claim.claimed_ratio, claim.name


def test_a_calibration_reaches_ours(subject: suites.Subject) -> None:
    eye = torch.eye(64).expand(tiny.HEADS, 64, 64)
    layer = fit_key_basis(torch.zeros(tiny.HEADS, 64), eye, eye)
    formats = (Format(4, 4), Format(3, 2))
    calibration = Calibration("", (layer,) * tiny.LAYERS, {"lossless": formats})
    candidates = suites.claims(suites.Subject(subject.model, subject.token_ids, calibration))
    for claim, ours in zip(suites.CLAIMS, candidates[1::2], strict=True):
        assert ours.name.endswith(" calibrated")
        cache = ours.cache(subject.model, quantize_at_once=False)
        expected = formats if claim.tier_name == "lossless" else (Format(3, 2), Format(3, 2))
        assert tuple(layout.format for layout in cache.pages.layouts) == expected
        cache.update(*tiny.keys_and_values(1, 128, 64), 0)
        assert cache.store.bases[0].key_shaping is not None


def test_spread_needs_no_more_than_a_pass(subject: suites.Subject) -> None:
    spread = suites.measure_spread(subject)
    assert len(spread) == tiny.LAYERS
    assert all(0 < share <= 1 for share in spread)


def test_other_suites_hold_our_tiers_and_somebody_elses(subject: suites.Subject) -> None:
    assert [candidate.name for candidate in suites.SUITES["tiers"](subject)] == list(TIERS)
    peers = suites.SUITES["peers"](subject)
    assert {candidate.source for candidate in peers} >= {"ours", "peer"}
    assert len({candidate.name for candidate in peers}) == len(peers)
    assert suites.SUITES["ablations"](subject)
    assert [candidate.source for candidate in suites.SUITES["trellis"](subject)] == ["ours"] * 6


def test_caches_of_the_lab_are_transformers_caches(subject: suites.Subject) -> None:
    for candidate in [*suites.claims(subject)[:6], *suites.SUITES["peers"](subject)[-2:]]:
        assert isinstance(candidate.cache(subject.model, quantize_at_once=False), Cache)


# --- in chunks ---


def test_a_chunk_reads_those_before_it_as_stored_and_itself_raw() -> None:
    """Of two chunks the second is what protocol `continue` scores; of its own cache a model is not off at all."""
    model, chunk = tiny.model(), 64
    [ids] = token_ids = torch.randint(0, tiny.VOCABULARY, (1, 2 * chunk))
    ours = Ours("k3v2", K3V2)
    sides = {"k3v2": (model, ours.cache(model, quantize_at_once=False)), "raw": (model, DynamicCache())}
    scores = measure_in_chunks(model, ids, sides, chunk)
    [row] = measure(model, token_ids, [ours], ("continue",), new_tokens=chunk)
    assert scores["k3v2"].metrics()["kl_mean"] == pytest.approx(row["kl_mean"], rel=1e-4)
    assert scores["k3v2"].metrics()["ppl"] == pytest.approx(row["ppl"], rel=1e-5)
    assert row["kl_mean"] > 1e-3 and scores["raw"].metrics()["kl_max"] == 0
