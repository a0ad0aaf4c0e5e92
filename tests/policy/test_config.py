"""Settings and tiers."""

from __future__ import annotations

import pytest

from sglang_deltastore.policy.config import Settings
from sglang_deltastore.policy.tiers import ADAPTIVE, TIERS, tier

#: at head_dim 64, counting codes, scales, anchors and padding of 16-token pages with 3 KV heads;
#: the floors are what is promised to users
RATIOS_HEAD_DIM_64 = {
    "raw": (1.0, 1.0),
    "lossless": (4.1, 4.4651),
    "k4v2": (5.0, 5.1892),
    "conservative": (6.1, 6.1935),
    "k2v2": (7.5, 7.6800),
}


@pytest.mark.parametrize("name", TIERS)
def test_ratio_of_every_tier(name: str) -> None:
    (layout,) = tier(name).layouts([3], head_dim=64, page_tokens=16)
    floor, exact = RATIOS_HEAD_DIM_64[name]
    ratio = layout.raw_page_bytes / layout.page_bytes
    assert ratio >= floor
    assert ratio == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_calibrated_formats_take_as_many_bytes(head_dim: int) -> None:
    for each in TIERS.values():
        (plain,) = each.layouts([3], head_dim, page_tokens=16)
        (calibrated,) = each.layouts([3], head_dim, page_tokens=16, formats=[each.calibrated or each.format])
        assert calibrated.page_bytes == plain.page_bytes


def test_adaptive_holds_what_its_coarsest_level_holds() -> None:
    assert ADAPTIVE.levels == ("lossless", "conservative")
    assert ADAPTIVE.format == TIERS["lossless"].format
    assert Settings(tier_name="adaptive").tier is ADAPTIVE
    with pytest.raises(ValueError, match="adaptive: unknown tier; known are raw, lossless, k4v2, conservative"):
        tier("adaptive")  # of a cache without levels


def test_off_by_default() -> None:
    assert not Settings().enabled


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"mode": "deltastor"}, "none, deltastore"), ({"tier_name": "k5"}, "raw, lossless, k4v2, conservative")],
)
def test_unknown_values_name_the_known_ones(arguments: dict[str, str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Settings(**arguments)


@pytest.mark.parametrize("share", [-0.01, 1.01, float("nan")])
def test_a_share_that_is_none(share: float) -> None:
    with pytest.raises(ValueError, match=f"--kv-compress-canary {share}: allowed is the share of requests to measure"):
        Settings(canary=share)
    assert [Settings(canary=allowed).canary for allowed in (0, 0.01, 1)] == [0, 0.01, 1]
