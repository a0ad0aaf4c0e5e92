"""What a running server says of itself, against what its clients know: every number of /deltastore/stats."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from sglang_deltastore import cli
from sglang_deltastore.host.server_process import Server
from sglang_deltastore.observe.series import CANARY_KL, COUNTERS, GAUGES, LABELLED, PREFIX, shown_in
from sglang_deltastore.observe.stats import StoreStats, table
from tests.e2e.client import flush, generate, prompt
from tests.e2e.conftest import DELTASTORE, StartServer
from tests.observe.twin import Twin

pytestmark = pytest.mark.slow

LABELS = {fact.label[0] for fact in table().values() if fact.label}

P, CAPACITY_TOKENS, RUNNING = 16, 2048, 4
#: SmolLM2's 30 layers, 3 KV heads of 64, at 4 and 2 bits: codes of a page of one tile, and its scales and anchors
CODES_BYTES, SCALES_BYTES, PAGE_BYTES = 30 * 3 * 16 * 64 * 6 // 8, 30 * 3 * (16 + 2), 30 * 2368
FP16_TOKEN_BYTES = 30 * 3 * 64 * 2 * 2


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    return start_server(
        *DELTASTORE,
        *("--kv-compress-tier", "k4v2", "--max-total-tokens", str(CAPACITY_TOKENS)),
        *("--max-running-requests", str(RUNNING), "--chunked-prefill-size", "128", "--enable-metrics"),
    )


@dataclass
class Ledger:
    """What clients sent and received since the store was empty."""

    server: Server
    asked: list[tuple[list[int], list[int], int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        flush(self.server)
        self.before = self.server.settled_stats()

    def ask(self, tokens: list[int], answer_tokens: int) -> list[int]:
        """Returns prompt and answer: what the next turn begins with."""
        answer = generate(self.server, tokens, tokens=answer_tokens)
        self.asked.append((tokens, answer["output_ids"], answer["meta_info"]["cached_tokens"]))
        return tokens + answer["output_ids"]

    def paths(self) -> list[tuple[tuple[int, ...], ...]]:
        """Each request's whole pages. The last token of an answer is sampled and never run."""
        return [pages_of([*tokens, *output[:-1]]) for tokens, output, _ in self.asked]

    def twin(self) -> Twin:
        """What must be stored of it, while nothing is evicted."""
        twin = Twin(P)
        for path, (tokens, _, cached) in zip(self.paths(), self.asked, strict=True):
            twin.stored(path)
            twin.ended(path, cached, len(tokens))
        return twin


def pages_of(tokens: list[int]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tokens[at : at + P]) for at in range(0, len(tokens) // P * P, P))


@pytest.fixture(scope="module")
def ledger(server: Server) -> Ledger:
    """Two shared prompts, three users of several turns, a turn asked anew, a question asked twice."""
    ledger = Ledger(server)
    tools, other = prompt(200, seed=1), prompt(75, seed=2)
    ada = ledger.ask([*tools, *prompt(21, seed=3)], 25)
    ben = ledger.ask([*tools, *prompt(34, seed=4)], 18)
    second = ledger.ask([*ada, *prompt(30, seed=5)], 20)
    ledger.ask([*ada, *prompt(30, seed=6)], 20)  # the second turn anew
    ledger.ask([*ben, *prompt(9, seed=7)], 40)
    ledger.ask([*second, *prompt(50, seed=8)], 3)
    ledger.ask([*other, *prompt(17, seed=9)], 20)
    ledger.ask([*other, *prompt(17, seed=9)], 20)
    ledger.ask(prompt(5, seed=10), 2)  # less than a page: leaves nothing
    return ledger


@pytest.fixture(scope="module")
def stats(ledger: Ledger) -> StoreStats:
    return ledger.server.settled_stats()


def test_tokens_contexts_and_conversations(ledger: Ledger, stats: StoreStats) -> None:
    twin = ledger.twin()
    assert (stats.census_current, stats.accounting_errors) == (True, ())
    assert (stats.untracked_tokens, stats.observation_errors) == (0, 0)
    assert stats.contexts == len(twin.contexts()) == 4
    assert stats.conversations == len(twin.conversations()) == 3
    assert stats.logical_tokens == twin.logical_tokens()
    assert stats.conversation_tokens == twin.conversation_tokens()
    assert stats.stored_tokens == twin.stored_tokens() == stats.pages_in_nodes * P
    assert stats.logical_tokens > stats.conversation_tokens > stats.stored_tokens
    assert stats.dedup == stats.logical_tokens / stats.stored_tokens
    assert stats.branch_dedup * stats.prefix_dedup == pytest.approx(stats.dedup)
    assert stats.fp16_unshared_bytes == stats.logical_tokens * FP16_TOKEN_BYTES
    assert stats.fp16_shared_bytes == stats.stored_tokens * FP16_TOKEN_BYTES
    assert stats.pages_free == stats.pages_total - stats.pages_in_nodes
    assert stats.shared_tokens == twin.shared_tokens()


def test_bytes(stats: StoreStats) -> None:
    pages, sinks = CAPACITY_TOKENS // P + 1, RUNNING + -(-CAPACITY_TOKENS // P // 32)
    assert (stats.codes_bytes, stats.scales_bytes) == (pages * CODES_BYTES, pages * SCALES_BYTES)
    assert stats.pages_bytes == stats.codes_bytes + stats.scales_bytes + stats.padding_bytes == pages * PAGE_BYTES
    assert stats.frames_bytes == (RUNNING + 1) * 16 * FP16_TOKEN_BYTES
    assert (stats.sinks_total, stats.sinks_bytes) == (sinks, (sinks + 1) * FP16_TOKEN_BYTES)
    assert stats.resident_bytes == sum(getattr(stats, field) for field in LABELLED["resident_bytes"])
    used_sinks = (stats.sinks_total - stats.sinks_free) * FP16_TOKEN_BYTES
    assert stats.used_bytes == stats.pages_in_nodes * PAGE_BYTES + used_sinks
    assert stats.times_unshared_fp16 == stats.fp16_unshared_bytes / stats.used_bytes
    assert stats.times_shared_fp16 == stats.fp16_shared_bytes / stats.used_bytes
    assert stats.ratio == FP16_TOKEN_BYTES * P / PAGE_BYTES


def test_requests_hits_and_steps(ledger: Ledger, stats: StoreStats) -> None:
    before = ledger.before
    assert stats.requests - before.requests == len(ledger.asked)
    assert stats.prompt_tokens - before.prompt_tokens == sum(len(tokens) for tokens, _, _ in ledger.asked)
    assert stats.hit_tokens - before.hit_tokens == sum(cached for _, _, cached in ledger.asked) > 0
    whole_tiles = sum(len(path) * P for path in ledger.paths()) - sum(cached for _, _, cached in ledger.asked)
    assert stats.encoded_tokens - before.encoded_tokens == whole_tiles
    # The overlapped scheduler has begun one more step when a request turns out to have ended.
    steps = sum(len(output) - 1 for _, output, _ in ledger.asked)
    over = stats.decode_steps - before.decode_steps - steps
    assert over in (0, len(ledger.asked))
    extra = bool(over)
    read = sum(
        length // 16 * PAGE_BYTES + length % 16 * FP16_TOKEN_BYTES
        for tokens, output, _ in ledger.asked
        for length in range(len(tokens) + 1, len(tokens) + len(output) + extra)
    )
    assert stats.decode_read_bytes - before.decode_read_bytes == read


def test_nodes(ledger: Ledger, stats: StoreStats) -> None:
    twin = ledger.twin()
    for node in stats.nodes:
        begin, end = node.start_tokens // P, (node.start_tokens + node.tokens) // P
        possible = [twin.node(path, begin) for path in twin.pages if len(path) == end]
        assert {name: getattr(node, name) for name in possible[0]} in possible
        assert node.children == sum(other.parent == node.id for other in stats.nodes)
    assert len(stats.nodes) == stats.nodes_total > 8
    assert sum(node.tokens for node in stats.nodes) == stats.stored_tokens
    assert sum(node.tokens * node.contexts for node in stats.nodes) == stats.logical_tokens
    assert sum(node.tokens * node.conversations for node in stats.nodes) == stats.conversation_tokens
    assert sum(node.hit_tokens for node in stats.nodes) == sum(cached for _, _, cached in ledger.asked)
    # The tool prompt: six requests went through it, and the first one computed it, 128 tokens at a time.
    tools = [node for node in stats.nodes if node.hits == 5]
    assert sum(node.tokens for node in tools) == 192
    assert {(node.contexts, node.conversations, node.requests) for node in tools} == {(3, 2, 6)}
    assert not any(node.first_token_ids or node.text for node in stats.nodes), "nobody asked to show prompts"


def test_metrics_show_the_same(server: Server, stats: StoreStats) -> None:
    text = requests.get(server.url + "/metrics", timeout=60).text
    samples = {
        (sample.name, next((sample.labels[label] for label in LABELS if label in sample.labels), None)): sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith(PREFIX)
    }
    for name in GAUGES:
        assert samples[PREFIX + name, None].value == pytest.approx(getattr(stats, name)), name
    for name in COUNTERS:
        assert samples[f"{PREFIX}{name}_total", None].value == pytest.approx(getattr(stats, name)), name
    for series, fields in LABELLED.items():
        for name, value in fields.items():
            assert samples[PREFIX + series, value].value == getattr(stats, name)
    assert all(sample.labels["tier"] == "k4v2" and sample.labels["model_name"] for sample in samples.values())
    board = json.loads((Path(__file__).parents[2] / "docker" / "grafana-dashboard.json").read_text())
    for panel in board["panels"]:
        for target in panel["targets"]:
            served = {name.removeprefix(PREFIX).removesuffix("_total") for name, _ in samples}
            # Without --kv-compress-canary there is no such series; with it, see test_canary_server.py.
            shown = {name for name in shown_in([target["expr"]]) if not name.startswith(CANARY_KL)}
            assert shown <= served, f"{panel['title']} shows what is not there"


def test_top(server: Server, stats: StoreStats, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", "--once", "--url", server.url]) == 0
    shown = capsys.readouterr().out
    for expected in ("tier k4v2", f"{stats.times_unshared_fp16:.2f}x", f"free {stats.pages_free:,}", "hottest nodes"):
        assert expected in shown
    assert cli.main(["top", "--once", "--json", "--url", server.url]) == 0
    assert StoreStats.from_dict(json.loads(capsys.readouterr().out)).stored_tokens == stats.stored_tokens
    assert cli.main(["top", "--once", "--url", "http://127.0.0.1:1"]) == 1
    assert "say where with --url" in capsys.readouterr().err


def test_evictions(server: Server) -> None:
    ledger = Ledger(server)
    for seed in range(12):  # of different prompts: nothing is found stored
        ledger.ask(prompt(230, seed=100 + seed), 5)
    before, stats = ledger.before, server.settled_stats()
    assert (stats.accounting_errors, stats.untracked_tokens, stats.observation_errors) == ((), 0, 0)
    inserted = sum(len(path) * P for path in ledger.paths())
    assert stats.evicted_tokens - before.evicted_tokens == inserted - stats.stored_tokens > 0
    assert 0 < stats.evictions - before.evictions <= 12
    assert stats.eviction_seconds > before.eviction_seconds
    assert stats.hit_tokens == before.hit_tokens


def test_a_request_that_runs(server: Server) -> None:
    ledger = Ledger(server)
    stem = prompt(100, seed=50)
    ledger.ask(stem, 30)
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(generate, server, [*stem, *prompt(40, seed=51)], tokens=150)
        snapshots: list[StoreStats] = []
        while not answer.done():
            snapshots.append(server.store_stats())
            time.sleep(0.1)
    running = [stats for stats in snapshots if stats.frames_running]
    assert len(running) > 5
    for stats in running:
        assert stats.accounting_errors == ()
        own_tokens = stats.stored_tokens - stats.pages_in_nodes * P
        assert stats.pages_running == -(-own_tokens // P)
        assert stats.pages_free + stats.pages_in_nodes + stats.pages_running == stats.pages_total
        assert stats.contexts == 2, "the request that has ended, and the one that runs"
    last = running[-1]
    assert max(node.running for node in last.nodes) == 1
    assert last.logical_tokens - last.stored_tokens == 96  # the six whole pages of the stem


def test_the_metrics_settle_without_being_asked(server: Server) -> None:
    generate(server, prompt(60, seed=77))
    wanted = f"{PREFIX}requests_total"
    values = []
    for _ in range(40):
        time.sleep(0.25)
        lines = requests.get(server.url + "/metrics", timeout=60).text.splitlines()
        values.append(next(float(line.split()[-1]) for line in lines if line.startswith(wanted)))
    assert values[-1] == server.settled_stats().requests


def test_the_servers_own_log_lines(server: Server) -> None:
    generate(server, prompt(60, seed=60), tokens=90)
    lines = server.log_path.read_text().splitlines()
    for kind in ("Prefill batch", "Decode batch"):
        assert any(kind in line and "deltastore: k4v2 5.19x, shared " in line for line in lines), kind
