"""The planner against figures worked by hand, and the published claims against theirs."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sglang_deltastore.fleet.claims import Checked, Tables, check, check_claims
from sglang_deltastore.fleet.kv import FP16, KvTier, parse_tier
from sglang_deltastore.fleet.planner import Assumptions, DoesNotFit, Fleet, Plan, Workload, footprint, growth, plan
from sglang_deltastore.fleet.tables import DATA, Gpu, pick, read_table

TABLES = Tables.read()
LLAMA_8B, LLAMA_70B, QWEN_72B = (TABLES.models[name] for name in ("Llama-3-8B", "Llama-3-70B", "Qwen2-72B"))
FP16_8B, FP16_70B = 131_072, 327_680  # 2 (K, V) x 32 or 80 layers x 8 heads x 128 x 2 bytes
IDLE = Workload(users=10_000, context_tokens=4096, active_share=0.0)
ALONE = Assumptions(max_tensor_parallel=1)


def fleet(gpu: str = "A100-80", workload: Workload = IDLE, **options: Any) -> Fleet:
    return Fleet(LLAMA_8B, TABLES.gpus[gpu], TABLES.energy, workload, **options)


def test_bytes_a_token() -> None:
    assert FP16.bytes_per_token(LLAMA_8B) == FP16_8B
    assert FP16.bytes_per_token(LLAMA_70B) == FP16.bytes_per_token(QWEN_72B) == FP16_70B
    assert parse_tier("fp8").bytes_per_token(LLAMA_8B) == FP16_8B / 2
    # K3V2, a page of 16 tokens: 8 heads x (768 + 512 bytes of codes, 16 of scales, 2 of anchors) = 10,384, 32 layers
    assert parse_tier("conservative").bytes_per_token(LLAMA_8B) == 32 * 10_384 / 16 == 20_768
    # K4V3 on each of 8 GPUs with one head: 1024 + 768 + 18 = 1,810, padded to 1,824
    assert parse_tier("lossless").bytes_per_token(LLAMA_8B, tensor_parallel=8) == 8 * 32 * 1824 / 16
    # 16 GPUs repeat the 8 heads
    assert FP16.bytes_per_token(LLAMA_8B, tensor_parallel=16) == 2 * FP16_8B
    assert parse_tier("balanced=10.2").bytes_per_token(LLAMA_8B) == FP16_8B / 10.2
    # a frame: 16 tokens of raw K and V
    assert parse_tier("conservative").frame_bytes(LLAMA_8B) == 16 * FP16_8B
    assert parse_tier("fp8").frame_bytes(LLAMA_8B) == parse_tier("balanced=10.2").frame_bytes(LLAMA_8B) == 0


def test_a_group_shares_heads_evenly() -> None:
    """40 query and 10 KV heads: two GPUs can share them, four and eight cannot (four would lose two KV heads)."""
    phi = replace(LLAMA_8B, query_heads=40, kv_heads=10)
    assert FP16.bytes_per_token(phi) == FP16.bytes_per_token(phi, tensor_parallel=2) == 2 * 32 * 10 * 128 * 2
    assert FP16.bytes_per_token(phi, tensor_parallel=20) == 2 * FP16.bytes_per_token(phi)
    for size in (4, 8):
        with pytest.raises(ValueError, match=f"tensor_parallel={size}.*10 KV heads"):
            FP16.bytes_per_token(phi, tensor_parallel=size)
    for users in (1, 100, 10_000):
        assert plan(replace(fleet(), model=phi, workload=replace(IDLE, users=users)), FP16).tensor_parallel <= 2


def test_a_state_takes_memory_and_bandwidth() -> None:
    """10,000 users of 10 MB besides 2048 x 131,072 bytes, 10 MB behind the prefix: 2,784,354,560,000 bytes in
    54,061,042,048: 51.5, so 52."""
    hybrid = replace(LLAMA_8B, state_bytes=10_000_000)
    found = plan(replace(fleet(assumptions=ALONE), model=hybrid), FP16)
    assert found.gpus == 52
    assert found.kv_bytes == 10_000 * (2048 * FP16_8B + 10_000_000) + 52 * (2048 * FP16_8B + 10_000_000)
    branches = replace(IDLE, branches=3, turn_tokens=1)
    three = plan(replace(fleet(assumptions=ALONE, workload=branches), model=hybrid), FP16, shared=False)
    assert three.kv_bytes == 10_000 * 3 * (4096 * FP16_8B + 10_000_000)
    # a step of 117.25e9 bytes less the weights reads and writes 88 states of 0.3 GB besides 4096 x 131,072 bytes each
    busy = Workload(users=1000, context_tokens=4096, active_share=1.0, resident_share=0.01)
    slow = replace(fleet("H100-80", busy, assumptions=ALONE), model=replace(LLAMA_8B, state_bytes=300_000_000))
    assert plan(slow, FP16).replicas_bandwidth == math.ceil(1000 / 88)


def test_tiers_by_name_and_by_assumed_ratio() -> None:
    assert parse_tier("6.1x") == parse_tier("6.1") == KvTier("6.1x", 6.1)
    assert parse_tier("balanced=10.2").label == "balanced (what if: 10.2x)"
    assert parse_tier("conservative").label == "conservative"
    for text, message in (
        ("balanced", "NAME=10.2"),
        ("x=0", "above 0"),
        ("-3", "above 0"),
        ("x=nan", "above 0"),
        ("x=lots", "a number"),
        ("", "known are fp16"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_tier(text)


def test_memory_decides() -> None:
    """A100: 80e9 x 0.88 - 16,060,522,496 of weights - 2048 x 131,072 of prefix = 54,071,042,048 bytes a GPU; 10,000 x
    2048 x 131,072 = 2,684,354,560,000 of contexts: 49.6, so 50."""
    found = plan(fleet(assumptions=ALONE), FP16)
    assert (found.gpus, found.tensor_parallel, found.binds) == (50, 1, "memory")
    assert found.kv_bytes == 10_050 * 2048 * FP16_8B
    # nothing shared: 4096 private tokens each in 80e9 x 0.88 - weights = 54,339,477,504: 98.8, so 99
    assert plan(fleet(assumptions=ALONE), FP16, shared=False).gpus == 99
    # conservative: 2048 x 20,768 x 10,000 = 425,328,640,000 in 54,296,944,640 bytes: 7.8, so 8
    assert plan(fleet(assumptions=ALONE), parse_tier("conservative")).gpus == 8
    # groups of 8: 8 x 70.4e9 - weights - prefix = 546,871,042,048, and 4.9 of them hold the same: 40 GPUs
    best = plan(fleet(), FP16)
    assert (best.gpus, best.tensor_parallel, best.replicas) == (40, 8, 5)


def test_decode_bandwidth_decides() -> None:
    """H100, 20 tokens/s for each of 1,000: a step may read 3350e9 x 0.7 / 20 = 117.25e9 bytes; less the weights that is
    188 contexts of 4096 x 131,072, so 6 GPUs; one user in a hundred resident needs only one."""
    busy = Workload(users=1000, context_tokens=4096, active_share=1.0, resident_share=0.01)
    found = plan(fleet("H100-80", busy, assumptions=ALONE), FP16)
    assert (found.replicas_memory, found.replicas_bandwidth, found.gpus) == (1, 6, 6)
    assert found.binds == "decode bandwidth"
    # fp8 reads half: 376 contexts, 3 GPUs
    assert plan(fleet("H100-80", busy, assumptions=ALONE), parse_tier("fp8")).replicas_bandwidth == 3


def test_frames_take_memory() -> None:
    # 10 resident users and 1,000 running: 1,000 x 2,097,152 bytes of frames besides 10 x 2048 x 20,768
    work = Workload(users=1000, context_tokens=4096, active_share=1.0, resident_share=0.01, tokens_per_s=1)
    assert plan(fleet("H100-80", work), parse_tier("conservative")).kv_bytes == (1000 * 2_097_152 + 11 * 2048 * 20_768)


def test_a_workload_counts_tokens() -> None:
    work = Workload(users=3, shared_prefix_tokens=1000, turns=4, turn_tokens=100, branches=3)
    assert work.context_tokens == 1400
    assert work.private_tokens_per_user == 400 + 2 * 100
    assert work.unshared_tokens_per_user == 3 * 1400
    assert work.snapshot_tokens_per_user == 1400 + 1300 + 1200 + 1100 + 2 * 1400


def test_a_year_of_ten_a100() -> None:
    """10 x 400 W x 8,760 h = 35,040 kWh of IT; x 1.4 at the meter; 0.367 kg and, on IT energy, 0.38 L each."""
    assert footprint(fleet(), 10) == pytest.approx(
        {
            "cost_usd_per_year": 113_880,
            "energy_mwh_per_year": 49.056,
            "co2_t_per_year": 18.003552,
            "water_l_per_year": 13_315.2,
        }
    )


def test_growth_is_the_plan_at_each_size() -> None:
    steps = growth(fleet(assumptions=ALONE), [FP16])
    assert [step["users"] for step in steps] == [100, 1000, 10_000, 100_000]
    assert [step["plans"][0]["gpus"] for step in steps] == [1, 10, 99, 988]
    assert [step["plans"][1]["gpus"] for step in steps] == [1, 5, 50, 497]


def test_a_model_that_fits_no_single_gpu_gets_a_group_or_a_reason() -> None:
    big = replace(fleet("H100-80"), model=LLAMA_70B, workload=replace(IDLE, users=1))
    assert plan(big, FP16).tensor_parallel == 4  # 141 GB in two: 140.8 GB are left of 160
    with pytest.raises(DoesNotFit, match=r"weights are 141.1 GB .* largest group of 1 GPUs has 70.4 GB .*Use a larger"):
        plan(replace(big, assumptions=ALONE), FP16)
    slow = replace(fleet(), workload=replace(IDLE, active_share=0.1, tokens_per_s=5000))
    with pytest.raises(DoesNotFit, match="5000 tokens/s"):
        plan(slow, FP16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"users": 0}, "users=0: must be at least 1"),
        ({"users": -5}, "at least 1"),
        ({"turns": 0}, "turns=0"),
        ({"branches": 0}, "branches=0"),
        ({"shared_prefix_tokens": -1}, "shared_prefix_tokens=-1"),
        ({"shared_prefix_tokens": 5000, "context_tokens": 4096}, "must be 0 to 4096"),
        ({"resident_share": 0}, "resident_share=0"),
        ({"active_share": 1.5}, "active_share=1.5: must be 0 to 1"),
        ({"tokens_per_s": 0}, "tokens_per_s=0"),
        ({"tokens_per_s": math.nan}, "tokens_per_s=nan"),
    ],
)
def test_bad_workloads(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Workload(**{"users": 1, **options})


def test_bad_assumptions() -> None:
    for options in ({"reserve_share": 1.0}, {"bandwidth_share": 0}, {"max_tensor_parallel": 0}, {"page_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Assumptions(**options)
    with pytest.raises(ValueError, match="page_size=24"):
        plan(fleet(assumptions=Assumptions(page_tokens=24)), parse_tier("conservative"))


def test_tables_of_the_users_own(tmp_path: Path) -> None:
    row = {**tomllib.loads((DATA / "gpus.toml").read_text())["H200"], "price_usd_per_h": 1.0}
    lines = "".join(f"{key} = {value!r}\n" for key, value in row.items())
    (tmp_path / "gpus.toml").write_text(f"[Mine]\n{lines}")
    tables = Tables.read(tmp_path)
    assert list(tables.gpus) == ["Mine"] and tables.models == TABLES.models
    for bad in (lines + "colour = 'red'\n", lines.replace("power_w = 700", "power_w = 0"), lines.replace("141", "'a'")):
        (tmp_path / "gpus.toml").write_text(f"[Mine]\n{bad}")
        with pytest.raises(ValueError, match=r"gpus\.toml, \[Mine\]"):
            read_table(Gpu, "gpus.toml", tmp_path)
    with pytest.raises(ValueError, match="known are A100-80"):
        pick(TABLES.gpus, "H1000", "GPU")


def test_every_row_of_every_table_names_its_source() -> None:
    for rows in (TABLES.gpus, TABLES.models, TABLES.energy):
        for row in rows.values():
            assert all(getattr(row, name) for name in vars(row) if name.endswith("source"))


class TestClaims:
    CHECKED = check_claims()

    def row(self, scenario: str, quantity: str) -> Checked:
        return next(row for row in self.CHECKED if row.scenario.startswith(scenario) and row.quantity == quantity)

    def test_160_mb_is_one_head_of_eight(self) -> None:
        row = self.row("72B, 4K context", "KV per user without, MB")
        assert row.derived == 4096 * FP16_70B / 1e6 == 1342.17728
        assert row.reading == 4096 * FP16_70B / 8 / 2**20 == 160
        assert row.verdict == "only under another reading"

    def test_the_8b_fleet_counts_neither_weights_nor_working_memory(self) -> None:
        for users, claimed in ((2000, 7), (5000, 17), (10_000, 34)):
            row = self.row(f"8B, A100, {users:,} users", "GPUs without")
            assert row.reading == math.ceil(users * 2048 * FP16_8B / 80e9) == claimed == row.claimed
            assert row.derived > claimed and row.verdict == "only under another reading"

    def test_what_it_saves_does_not_follow_from_its_price(self) -> None:
        row = self.row("8B, A100, 10,000 users", "saved, $/year")
        assert (row.derived, row.verdict) == (30 * 2 * 8760, "does not follow")

    def test_the_70b_bytes_follow(self) -> None:
        for users, claimed in (("2,000", 524), ("5,000", 1310), ("10,000", 2620)):
            row = self.row(f"70B, H100, {users} employees", "KV, GB")
            contexts = int(users.replace(",", "")) / 5
            assert row.derived == contexts * 4000 * FP16_70B / 1e9 == pytest.approx(claimed, rel=0.001)
            assert row.verdict == "follows"

    def test_the_70b_groups(self) -> None:
        # 640e9 - 141.1e9 of weights = 498.9e9 a group of 8: 1,310.72e9 needs 3
        row = self.row("70B, H100, 5,000 employees", "GPUs without")
        assert (row.reading, row.claimed) == (8 * math.ceil(1310.72e9 / 498.9e9), 24)
        # 2,621.44e9 needs 6 of them, and more with a reserve: 40 is too few either way
        row = self.row("70B, H100, 10,000 employees", "GPUs without")
        assert row.derived == 8 * math.ceil(2621.44e9 / (8 * 70.4e9 - 141.107412992e9)) == 56
        assert row.verdict == "does not follow"

    def test_sharing_half_cannot_make_31(self) -> None:
        row = self.row("72B, 100 users, 50% shared", "times smaller")
        # 100 x 4096 over 2048 + 100 x 2048, times 327,680 over 51,920 bytes
        assert row.derived == pytest.approx(409_600 / 206_848 * 327_680 / 51_920)
        assert (round(row.derived, 1), row.verdict) == (12.5, "does not follow")

    def test_energy(self) -> None:
        row = self.row("30 A100 fewer", "MWh/year")
        assert (row.derived, row.verdict) == (pytest.approx(30 * 0.4 * 8.760), "follows")
        assert self.row("30 A100 fewer", "t CO2/year").derived == pytest.approx(39.78)
        assert self.row("30 A100 fewer", "litres of water/year").derived == pytest.approx(183_600)
        row = self.row("30 H100 fewer", "t CO2/year")
        assert (row.derived, row.verdict) == (pytest.approx(30 * 0.7 * 8.760 * 0.39), "only under another reading")

    def test_all_of_them(self) -> None:
        verdicts = [row.verdict for row in self.CHECKED]
        counts = {verdict: verdicts.count(verdict) for verdict in set(verdicts)}
        assert counts == {"follows": 11, "only under another reading": 12, "does not follow": 15}
        assert all(row.why and math.isfinite(row.derived) for row in self.CHECKED)

    @pytest.mark.parametrize(
        "change", [{"formula": "magic"}, {"colour": 1}, {"inputs": {"gpus": 3}}, {"inputs": {"gpus": 3, "price": 1}}]
    )
    def test_rows_that_cannot_be_derived(self, change: dict[str, Any]) -> None:
        row = {"scenario": "s", "quantity": "q", "claimed": 1, "formula": "usd_per_year", "why": "w",
               "inputs": {"gpus": 1, "price_usd_per_h": 1.0}}  # fmt: skip
        assert check(row, TABLES).derived == 8760
        assert check({**row, "claimed": 8760 * 1.005}, TABLES).verdict == "follows"
        assert check({**row, "claimed": 8760 * 1.02}, TABLES).verdict == "does not follow"
        assert check({**row, "claimed": 8760 * 1.02, "tolerance": 0.03}, TABLES).verdict == "follows"
        with pytest.raises(ValueError, match=r"claims\.toml"):
            check({**row, **change}, TABLES)


def test_plans_are_plain_records() -> None:
    assert json.loads(json.dumps(vars(plan(fleet(), FP16))))["gpus"] == 40
    assert isinstance(plan(fleet(), FP16), Plan)
