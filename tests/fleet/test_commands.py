"""`deltastore plan` and `deltastore replay` as a user runs them; the study behind the second."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sglang_deltastore import cli
from sglang_deltastore.fleet.formats import OWN_FORMAT
from sglang_deltastore.fleet.kv import FP16, parse_tier
from sglang_deltastore.fleet.replay import Costs
from sglang_deltastore.fleet.study import parse_budget, parse_storage, study
from sglang_deltastore.fleet.tables import Model, read_table
from sglang_deltastore.fleet.traces import Trace

CONFIGS = Path(__file__).parent / "configs"
LLAMA_8B = read_table(Model, "models.toml")["Llama-3-8B"]


@pytest.fixture
def trace_path(tmp_path: Path) -> Path:
    """60 requests, one every 10 s: three users in turn, each repeating its own 63 pages of 16 tokens and one token."""
    lines = [{"format": OWN_FORMAT, "block_tokens": 16}]
    for number in range(60):
        user = number % 3
        blocks = list(range(1000 * user, 1000 * user + 63))
        lines.append({"time_s": 10.0 * number, "prompt_tokens": 1009, "answer_tokens": 1, "blocks": blocks})
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_budgets() -> None:
    assert parse_budget("4M").bytes(LLAMA_8B) == 4e6 * 131_072
    assert parse_budget("500k").amount == 500_000
    assert parse_budget("80GB").bytes(LLAMA_8B) == 80e9
    assert parse_budget("1.5GiB").bytes(LLAMA_8B) == 1.5 * 2**30
    assert parse_budget("2TB").amount == 2e12
    for text in ("", "0", "-4M", "4X", "M", "4 M", "1e6"):
        with pytest.raises(ValueError, match="more than 0"):
            parse_budget(text)


def test_storages() -> None:
    disk = parse_storage("disk=4TB@3GB")
    assert (disk.name, disk.budget.amount, disk.bytes_per_s) == ("disk", 4e12, 3e9)
    assert parse_storage("host=1M").bytes_per_s is None
    for text in ("host", "=1GB", "host=", "host=lots"):
        with pytest.raises(ValueError, match=r"storage|budget"):
            parse_storage(text)


def test_a_study_gives_every_budget_and_tier(trace_path: Path) -> None:
    """Three users need 3 x 63 pages and one to spare, 3,040 tokens. Half that in fp16 hits nothing (the one who comes
    is always the one evicted); twice as many tokens in the same bytes hold all."""
    tiers = [FP16, parse_tier("fp8"), parse_tier("conservative")]
    result = study(Trace(trace_path), LLAMA_8B, [parse_budget("2000"), parse_budget("6400")], tiers)
    assert [(row.budget, row.tier, row.capacity_tokens) for row in result.rows] == [
        ("2000", "fp16", 2000),
        ("2000", "fp8", 4000),
        ("2000", "conservative", int(2000 * 131_072 / 20_768 / 16) * 16),
        ("6400", "fp16", 6400),
        ("6400", "fp8", 12_800),
        ("6400", "conservative", int(6400 * 131_072 / 20_768 / 16) * 16),
    ]
    assert [row.outcome.hit_tokens for row in result.rows] == [0, *[57 * 1008] * 5]
    assert result.endless.hit_tokens == 57 * 1008
    assert result.sharing.factor == result.sharing.temporal == 20 and result.sharing.across == 1


def test_workers_needed(trace_path: Path, tmp_path: Path) -> None:
    """Computing a prompt takes 1009 / 50 = 20.18 s, and one comes every 10 s. Two GPUs fall behind by 0.09 s with each
    of 60 requests, so the 54th waits 25 s; three do not. Where all but the first three hit, one is enough; where only
    one request fits at a time, no number is; and no number makes a prefill shorter."""
    costs = Costs(prefill_tokens_per_s=50, decode_tokens_per_s=1e6, stream_tokens_per_s=1e6)
    lines = trace_path.read_text().splitlines()
    records = [json.loads(line) for line in lines[1:]]
    for number, record in enumerate(records):
        record["blocks"] = list(range(1000 * number, 1000 * number + 63))
    unshared = tmp_path / "unshared.jsonl"
    unshared.write_text("\n".join([lines[0], *map(json.dumps, records)]))

    def needed(path: Path, budget: str, target_s: float) -> int | None:
        (row,) = study(Trace(path), LLAMA_8B, [parse_budget(budget)], [FP16], costs, target_s).rows
        return row.workers_needed

    assert (needed(unshared, "64k", 20.5), needed(unshared, "64k", 30)) == (3, 2)
    assert needed(trace_path, "6400", 20.5) == 1
    assert needed(unshared, "2000", 20.5) is None
    assert needed(trace_path, "6400", 1e-3) is None
    # 1,600 tokens a GPU hold one request each, so memory forbids nothing.
    per_worker = study(
        Trace(unshared), LLAMA_8B, [parse_budget("1600")], [FP16], costs, 20.5, budget_per_worker=True
    ).rows[0]
    assert (per_worker.workers_needed, per_worker.capacity_tokens) == (3, 1600)


def test_replay_prints_and_writes(trace_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.svg"
    arguments = ["replay", str(trace_path), "--budgets", "2000,6400", "--tiers", "fp16,half=2"]
    assert cli.main([*arguments, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "half (what if: 2x)" in printed and "95.00%" not in printed and "94.91%" in printed
    report = json.loads(out.read_text())
    assert report["rows"][0]["hit_tokens"] == 0 and report["rows"][1]["hit_tokens"] == 57 * 1008
    assert report["rows"][1]["computed_tokens"] == 60 * 1009 - 57 * 1008
    assert report["skipped_lines"] == 0 and report["costs"] is None
    pytest.importorskip("matplotlib")
    assert cli.main([*arguments, "--picture", str(picture)]) == 0
    assert picture.read_text().startswith("<?xml")


def test_replay_tells_of_storages(trace_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """2,000 fp16 tokens hold one of three users' prompts; 4,000 more behind them hold all."""
    out = tmp_path / "out.json"
    arguments = ["replay", str(trace_path), "--budgets", "2000", "--tiers", "fp16", "--storage", "host=4000@25GB"]
    assert cli.main([*arguments, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "from host" in printed and "evicted" not in printed and "94.91%" in printed
    report = json.loads(out.read_text())
    (row,) = report["rows"]
    assert (row["hit_tokens"], row["loaded_tokens"]) == (0, [57 * 1008])
    assert report["storages"] == ["host=4000@25GB"]


def test_replay_tells_of_levels(trace_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """190 pages of three users, one to spare: 600 fp16 tokens hold 169 pages finely, 236 at the floor, so `adaptive`
    keeps all, some coarser; 800 hold all finely. Only with levels are there columns of them."""
    out = tmp_path / "out.json"
    tiers = ("lossless", "conservative", "adaptive")
    arguments = ["replay", str(trace_path), "--tiers", ",".join(tiers)]
    assert cli.main([*arguments, "--budgets", "600,800", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "hit bits" in printed and "spared" in printed
    rows = {(row["budget"], row["tier"]): row for row in json.loads(out.read_text())["rows"]}
    lossless, conservative, adaptive = (rows["600", tier] for tier in tiers)
    assert (lossless["hit_tokens"], conservative["hit_tokens"], adaptive["hit_tokens"]) == (0, 57 * 1008, 57 * 1008)
    assert (
        conservative["worst_hit_bits"]
        <= adaptive["worst_hit_bits"]
        < adaptive["mean_hit_bits"]
        < lossless["mean_hit_bits"]
    )
    assert adaptive["demoted_pages"] > 0 and adaptive["evicted_pages"] == conservative["evicted_pages"] == 0
    assert sum(adaptive["hit_tokens_at"]) == 57 * 1008
    whole = ("hit_tokens", "mean_hit_bits", "worst_hit_bits", "demoted_pages", "evicted_pages", "peak_pages")
    assert [rows["800", "adaptive"][name] for name in whole] == [rows["800", "lossless"][name] for name in whole]
    assert cli.main(["replay", str(trace_path), "--budgets", "600", "--tiers", "conservative"]) == 0
    assert "hit bits" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--budgets", "lots"], "budget 'lots'"),
        (["--budgets", "5"], "larger budget"),
        (["--tiers", "magic"], "tier 'magic'"),
        (["--page-tokens", "24"], "page size that divides"),
        (["--chunk-tokens", "4"], "at least one page"),
        (["--prefill-tokens-per-s", "5"], "give all of"),
        (["--ttft-target-s", "5"], "needs the three rates"),
        (["--budget-per-worker"], "needs the three rates"),
        (["--storage", "host"], "NAME=SIZE"),
        (["--storage", "host=1GB@4"], "bytes a second"),
        (
            [
                "--storage",
                "host=1GB",
                "--prefill-tokens-per-s",
                "5",
                "--decode-tokens-per-s",
                "5",
                "--stream-tokens-per-s",
                "5",
            ],
            "need their speed",
        ),
        (["--model", "GPT-9"], "known are Llama-3-8B"),
        (["--picture", "x.bmp"], ".png or .svg"),
    ],
)
def test_replay_refuses(trace_path: Path, extra: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", str(trace_path), *extra]) == 2
    assert message in capsys.readouterr().err


def test_replay_of_a_bad_line(trace_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(trace_path, "a") as trace:
        trace.write('{"time_s": -1}\n')
    assert cli.main(["replay", str(trace_path)]) == 2
    assert "trace.jsonl, line 62" in capsys.readouterr().err
    assert cli.main(["replay", str(trace_path), "--on-error", "skip", "--budgets", "2000"]) == 0
    assert "1 bad lines left out" in capsys.readouterr().out
    assert cli.main(["replay", "no such file"]) == 2


def test_plan_prints_every_assumption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert cli.main(["plan", "--gpu", "A100-80", "--users", "10000", "--active-share", "0", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    for group in ("workload", "assumptions", "energy"):
        assert all(name in printed for name in report[group])
    assert report["gpu"]["price_source"][:30] in printed
    assert [result["gpus"] for result in report["plans"]][:2] == [80, 40]
    assert [step["users"] for step in report["growth"]] == [100, 1000, 10_000, 100_000]


def test_plan_explains_what_padding_takes(capsys: pytest.CaptureFixture[str]) -> None:
    """Eight GPUs hold one of Llama-3-70B's heads each: pages of 1,810 bytes take 1,824."""
    assert cli.main(["plan", "--model", "Llama-3-70B", "--tiers", "fp16,lossless,conservative"]) == 0
    printed = capsys.readouterr().out
    assert "lossless: 4.49 and not 4.53 as on one GPU, since each of 8 GPUs pads its own pages of 1 KV head" in printed
    assert "conservative: 6.24 and not 6.31" in printed
    assert cli.main(["plan", "--max-tensor-parallel", "1"]) == 0
    assert "pads its own pages" not in capsys.readouterr().out


def test_replay_refuses_a_model_with_states(
    trace_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text((CONFIGS / "LFM2-1.2B.json").read_text())
    assert cli.main(["replay", str(trace_path), "--model", str(tmp_path)]) == 2
    assert "keeps a state of 81,920 bytes besides KV" in capsys.readouterr().err


def test_plan_claims(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "claims.json"
    assert cli.main(["plan", "--preset", "claims", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert len(rows) == 38 and "11 follows, 12 only under another reading, 15 does not follow, of 38" in printed
    assert all(row["scenario"][:20] in printed for row in rows)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--users", "0"], "users=0"),
        (["--gpu", "Z80"], "known are A100-80"),
        (["--price", "-1"], "price_usd_per_h=-1.0"),
        (["--model", "Llama-3-70B", "--max-tensor-parallel", "1"], "Use a larger GPU"),
        (["--tiers", "fp16,nope"], "tier 'nope'"),
        (["--page-tokens", "20"], "page_size=20"),
    ],
)
def test_plan_refuses(extra: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *extra]) == 2
    assert message in capsys.readouterr().err


class Attributes(HTMLParser):
    """What a page refers to, and how its controls are labelled."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inputs_in_labels = self.depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.depth += tag == "label"
        self.inputs_in_labels += tag == "input" and self.depth > 0

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag == "label"


def test_the_page_stands_alone_and_shows_the_planners_figures(tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    assert cli.main(["plan", "--tiers", "fp16,conservative", "--html", str(page)]) == 0
    text = page.read_text()
    parser = Attributes()
    parser.feed(text)
    assert not [attrs for _, attrs in parser.tags if {"src", "href", "action"} & attrs.keys()]
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text
    assert not re.search(r"\b(fetch|XMLHttpRequest|import|url)\(", text)
    inputs = [attrs for tag, attrs in parser.tags if tag == "input"]
    assert len(inputs) == parser.inputs_in_labels == 5 and parser.depth == 0
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    at = data["contexts"].index(4096), data["prefix_shares"].index(0.5), data["active_shares"].index(0.1)
    lines = data["gpus"][at[0]][at[1]][at[2]]
    users = data["users"].index(10_000)
    assert data["tiers"] == ["fp16, nothing shared", "fp16", "conservative"]
    assert [line[users] for line in lines] == [80, 40, 8]  # as `deltastore plan` prints for the same workload
    assert data["per_gpu"]["cost_usd_per_year"] == pytest.approx(2.95 * 8760)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_picture(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / ("plan" + suffix)
    assert cli.main(["plan", "--picture", str(picture)]) == 0
    head = picture.read_bytes()[:5]
    assert head == (b"\x89PNG\r" if suffix == ".png" else b"<?xml")
    if suffix == ".svg":
        assert "US$ a year at $2.95/h" in picture.read_text()
