"""The runner's pieces: equal bytes, requests in order, every answer and every count checked."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.serving import report
from benchmarks.serving.__main__ import FULL, QUICK, _parser, _sizes
from benchmarks.serving.case import Case, working_set_tokens
from benchmarks.serving.client import Counters, WrongAnswer, ask
from benchmarks.serving.memory import PeakMemory
from benchmarks.serving.offline import batches
from benchmarks.serving.plot import draw
from benchmarks.serving.runner import Measured, check_counts, quantile, run_slice, slices, turned
from benchmarks.serving.sides import PAGE_TOKENS, Geometry, check_holds, sides
from benchmarks.serving.tree_count import tree_of
from benchmarks.serving.workloads import WORKLOADS, Prompt, Request
from sglang_deltastore.policy.tiers import TIERS
from tests.serving.fake_server import FakeServer, fake_server

FP16_BYTES = 30 * 3 * 64 * 2 * 2
BUDGET_BYTES = 3000 * FP16_BYTES


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as running:
        yield running


@pytest.fixture(scope="module")
def geometry(smollm2: Path) -> Geometry:
    return Geometry.of(smollm2)


def test_all_sides_get_the_same_bytes(geometry: Geometry) -> None:
    """What each side's tokens cost with all that belongs to them fits the budget, and one page more would not."""
    running = 3
    for side in sides(geometry, list(TIERS), BUDGET_BYTES, running):
        pages = side.capacity_tokens // PAGE_TOKENS
        if side.name == "stock":
            page_bytes, beside = PAGE_TOKENS * FP16_BYTES, 0
        else:
            size = geometry.store_size(side.name, running)
            page_bytes, beside = size.page_bytes, size.frames_bytes + size.sinks_bytes(pages)
            assert size.frames_bytes == (running + 1) * PAGE_TOKENS * FP16_BYTES
        taken = (pages + 1) * page_bytes + beside  # page 0 belongs to nobody
        # Two sinks are set aside where one may do.
        assert taken <= BUDGET_BYTES < taken + page_bytes + 2 * 30 * 3 * 64 * 2 * 2
        assert side.options["max_total_tokens"] == side.capacity_tokens


def test_sides_are_stock_raw_and_the_tiers(geometry: Geometry) -> None:
    stock, raw, packed = sides(geometry, ["k4v2"], BUDGET_BYTES, 2, calibration="some.safetensors")
    assert "--kv-compress" not in stock.arguments()
    assert stock.arguments()[stock.arguments().index("--attention-backend") + 1] == "torch_native"
    assert (raw.options["kv_compress_tier"], raw.options["kv_compress_calibration"]) == ("raw", "none")
    assert (packed.options["kv_compress_tier"], packed.options["kv_compress_calibration"]) == (
        "k4v2",
        "some.safetensors",
    )
    assert "--sleep-on-idle" in packed.arguments() and "True" not in packed.arguments()
    several = sides(geometry, ["lossless", "raw", "k4v2"], BUDGET_BYTES, 2)
    assert [side.name for side in several] == ["stock", "raw", "lossless", "k4v2"]


def test_a_budget_that_cannot_hold_the_longest_request_is_refused(geometry: Geometry) -> None:
    compared = sides(geometry, ["k4v2"], BUDGET_BYTES, 2)
    check_holds(compared, 2800)
    with pytest.raises(ValueError, match=r"raw has room for \d+ tokens; the longest request needs 2960"):
        check_holds(compared, 2928)


def test_the_tree_counts_distinct_pages_as_prefixes() -> None:
    """Against a set of all prefixes of whole pages."""
    pick = random.Random(5)
    contexts: list[Prompt] = []
    for _ in range(200):
        start = pick.choice(contexts)[: pick.randint(0, 90)] if contexts else []
        # Often the same page behind another: it is another page of the tree.
        pages = [word for word in pick.choices(range(3), k=pick.randint(0, 3)) for _ in range(PAGE_TOKENS)]
        contexts.append(start + pages + [pick.randrange(3) for _ in range(pick.randint(0, 20))])
    tree = tree_of(contexts, PAGE_TOKENS)
    prefixes = {tuple(c[:end]) for c in contexts for end in range(PAGE_TOKENS, len(c) + 1, PAGE_TOKENS)}
    leaves = prefixes - {prefix[:-PAGE_TOKENS] for prefix in prefixes}
    assert tree.pages == len(prefixes)
    assert tree.leaf_paths_pages == sum(len(leaf) // PAGE_TOKENS for leaf in leaves)
    assert tree.asked_pages == sum(len(context) // PAGE_TOKENS for context in contexts)
    sharing = tree.sharing()
    assert sharing.factor == pytest.approx(tree.asked_pages / len(prefixes))
    assert sharing.temporal * sharing.across == pytest.approx(sharing.factor)


def test_the_working_set_counts_answers_as_new_text() -> None:
    prompt = list(range(30))
    requests = [Request(0, prompt, 4), Request(0, prompt + list(range(100, 108)), 11)]
    # 30 + 3 tokens: two pages, the second with an answer in it; 38 + 10: the first again, two more
    assert working_set_tokens(requests, running=1) == (4 + 2) * PAGE_TOKENS


def test_a_case_gives_the_share_of_the_working_set_in_fp16(smollm2: Path) -> None:
    requests = [Request(session, [1000 * session + token for token in range(320)], 1) for session in range(10)]
    case = Case(requests, str(smollm2), ["k4v2"], share=0.5, running=2)
    assert case.working_set_tokens == 10 * 320 + 2 * 2 * PAGE_TOKENS
    assert case.budget_bytes == case.working_set_tokens * FP16_BYTES // 2
    stock, _, packed = (case.row(side) for side in case.sides)
    assert stock["capacity_tokens"] == case.working_set_tokens // 2 - PAGE_TOKENS  # page 0
    assert packed["capacity_tokens"] > 2 * case.working_set_tokens
    assert (packed["sessions"], packed["requests"], packed["longest_prompt_tokens"]) == (10, 10, 320)
    with pytest.raises(ValueError, match="give a larger --budget"):
        _ = replace(case, share=0.1).sides


def test_sizes_of_the_command_line_come_on_top_of_the_preset() -> None:
    line = ["--workload", "airline", "--data", "x", "--quick", "--turns", "3"]
    assert _sizes("airline", _parser().parse_args(line)) == replace(QUICK["airline"], turns=3)
    assert _sizes("airline", _parser().parse_args(line[:4])) == FULL["airline"]
    assert set(QUICK) == set(FULL) == set(WORKLOADS)
    for wrong in (["--workload", "airlines"], ["--budget", "0"], ["--tier", "k9"]):
        with pytest.raises(SystemExit):
            _parser().parse_args([*line, *wrong])


def test_a_slice_keeps_sessions_in_order_and_runs_others_at_once(server: FakeServer) -> None:
    server.step_s = 0.01
    requests = [Request(session, [session, turn], 3) for turn in range(4) for session in (0, 0, 1)]
    answers = run_slice(server.url, requests, running=3)
    assert [answer.prompt_tokens for answer in answers] == [2] * 12
    assert server.most_at_once == 2
    for session in (0, 1):
        assert [p for p in server.prompts if p[0] == session] == [r.prompt for r in requests if r.session == session]


def test_an_answer_of_another_length_is_an_error(server: FakeServer) -> None:
    answer = ask(server.url, [5] * 40, 6)
    assert (answer.computed_tokens, answer.output_ids) == (40, [1] * 6)
    assert 0 < answer.ttft_ms <= answer.total_ms
    server.lost_tokens = 1
    with pytest.raises(WrongAnswer, match=r"\(40, 5, 5\), must be \(40, 6, 6\)"):
        ask(server.url, [5] * 40, 6)


def test_time_to_first_token_is_not_that_of_the_answer(server: FakeServer) -> None:
    server.step_s = 0.1
    answer = ask(server.url, [5] * 40, 6)  # five steps after the first token
    assert answer.ttft_ms < answer.total_ms - 2 * 100


def test_servers_and_clients_must_count_alike(server: FakeServer) -> None:
    measured = Measured(run_slice(server.url, [Request(0, [1] * 50, 2)], 1), 1.0, Counters.read(server.url))
    assert (measured.counters.computed_tokens, measured.counters.evicted_tokens) == (50, 11)
    check_counts("side", measured)
    for counters in (Counters(49, 0, 0), Counters(51, 0, 0), Counters(49, 0, 1)):
        with pytest.raises(RuntimeError, match="50 prompt tokens were computed, its own counter"):
            check_counts("side", Measured(measured.answers, 1.0, counters))
    check_counts("side", Measured(measured.answers, 1.0, Counters(80, 0, 1)))  # computed again after a retraction


def test_slices_and_turns() -> None:
    requests = [Request(number, [number], 1) for number in range(19)]
    assert [request for some in slices(requests) for request in some] == requests
    assert [turned(["a", "b", "c"], number)[0] for number in range(4)] == ["a", "b", "c", "a"]
    assert sorted(turned(["a", "b", "c"], 2)) == ["a", "b", "c"]


@pytest.mark.parametrize(("count", "expected"), [(1, 0), (10, 9), (100, 99), (1000, 990)])
def test_quantile(count: int, expected: int) -> None:
    assert quantile(range(count), 0.99) == expected


def test_batches_never_hold_a_session_twice() -> None:
    order = [0, 1, 1, 2, 3, 4, 4, 4]
    found = [[request.session for request in batch] for batch in batches([Request(s, [s], 1) for s in order], 3)]
    assert found == [[0, 1], [1, 2, 3], [4], [4], [4]]


def test_peak_memory_sees_children() -> None:
    taken = 200 * 2**20
    child = f"import time; x = bytearray(b'1') * {taken}; print('ready', flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, start_new_session=True) as process:
        process.stdout.readline()
        with PeakMemory({"side": process.pid}) as peak:
            pass
        os.killpg(process.pid, 9)
    assert taken < peak.bytes["side"] < taken + 100 * 2**20


def _row(side: str, ttft_ms: float, computed: int, rate: float) -> dict[str, object]:
    return {
        "benchmark": "serving", "workload": "airline", "budget_share": 0.25, "side": side, "ttft_p50_ms": ttft_ms,
        "ttft_p99_ms": 2 * ttft_ms, "output_tokens_per_s": rate, "prompt_tokens": 1000, "computed_tokens": computed,
        "cached_tokens": 1000 - computed, "evicted_tokens": 7, "retracted_requests": 0, "peak_rss_bytes": 2 * 10**9,
        "concurrency": 2, "sizes": {"answer_tokens": 4}, "seed": 0, "model": "m", "machine": "x", "cores": 2,
        "versions": {"sglang": "1", "torch": "2"}, "commit": "c",
    }  # fmt: skip


def test_the_table_of_latency_has_a_column_for_each_side() -> None:
    found = {"stock": (100.0, 10.0), "raw": (50.0, 20.0), "llama.cpp f16": (200.0, None)}
    rows = [
        {"side": side, "metric": metric, "context_tokens": 4096, "median": value}
        for side, values in found.items()
        for metric, value in zip(("time per output token", "8 at once, tokens/s"), values, strict=True)
        if value is not None
    ]
    assert report.latency(rows).splitlines()[2:] == [
        "| time per output token | 4,096 | 100 | 50.0 (2.00x) | 200 (0.50x) |",
        "| 8 at once, tokens/s | 4,096 | 10.0 | 20.0 (2.00x) |  |",
    ]


def test_the_report_says_how_many_times_better(tmp_path: Path) -> None:
    rows = [_row("stock", 3000, 900, 1.0), _row("raw", 2000, 800, 2.0), _row("k4v2", 1000, 200, 3.0)]
    other_runs = [{**row, "concurrency": 4, "ttft_p50_ms": 9.0} for row in rows]
    stock, raw, packed = report.markdown([*other_runs, *rows]).strip().splitlines()[-3:]
    assert stock.split("|")[5].strip() == "3.00"
    assert raw.split("|")[5].strip() == "2.00 (1.50x)"
    cells = [cell.strip() for cell in packed.split("|")]
    assert cells[5] == "1.00 (3.00x, 2.00x)"
    assert cells[7:10] == ["3.00 (3.00x, 1.50x)", "200 (4.50x, 4.00x)", "80%"]
    assert report.summary(rows).splitlines()[-1] == (
        "| airline | 2 | `k4v2` | 1.00 (3.00x, 2.00x) | 2.00 | 3.00 (3.00x, 1.50x) | 200 (4.50x, 4.00x) | 80% |"
    )
    draw(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="leave it out"):
        draw([], tmp_path / "none.png")
    json.dumps(rows)
