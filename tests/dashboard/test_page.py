"""The dashboard in a real browser, over facts made up for each case."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from sglang_deltastore.seam import facts
from tests.dashboard.conftest import FactServer
from tests.observe.test_stats import scheduler

#: what tests make the console say on purpose
PROVOKED = ("status of 503", "status of 401", "inline event handler violates")
HOSTILE = """<img src=x onerror="document.title='owned'"><script>document.title='owned'</script> & </style>"""


@pytest.fixture(scope="module")
def real() -> dict[str, Any]:
    """A shared stem of 32 tokens (id 5), two branches (6, 7), and a running request."""
    stats = facts.LiveFacts(scheduler()).fresh().as_dict()
    times = [stats["taken_at_s"] - 5.0 * ago for ago in range(30, -1, -1)]
    columns = {
        name: [stats[name] * (at + 10) // 40 for at in range(31)] for name in stats["history"] if name != "time_s"
    }
    return {**stats, "history": {"time_s": times, **columns}, "snapshot_seconds": 0.001}


@pytest.fixture
def stats(real: dict[str, Any], fact_server: FactServer) -> dict[str, Any]:
    """What the server answers; change it as you like."""
    changed = copy.deepcopy(real)
    fact_server.facts = [changed]
    return changed


@pytest.fixture
def tab(request: pytest.FixtureRequest, browser: Browser) -> Iterator[Page]:
    """An empty tab; errors in the page, and words on its console, fail the test."""
    colors = getattr(request, "param", "light")
    with browser.new_context(color_scheme=colors, viewport={"width": 1200, "height": 900}) as context:
        tab, said = context.new_page(), []
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("console", lambda message: said.append(message.text))
        yield tab
        assert [words for words in said if not any(allowed in words for allowed in PROVOKED)] == []


def test_figures_are_the_facts(tab: Page, fact_server: FactServer, stats: dict[str, Any]) -> None:
    tab.goto(fact_server.url)
    expect(tab.locator("#tier")).to_have_text("tier k4v2 (K3.5V2.5 by layer), pages of 32 tokens")
    cards = tab.locator("#cards")
    for name in ("times_unshared_fp16", "times_shared_fp16", "ratio", "dedup"):
        expect(cards).to_contain_text(f"{stats[name]:,.2f}\N{MULTIPLICATION SIGN}")
    expect(cards).to_contain_text("of prompts found stored24.6%32 of 130 tokens")
    expect(tab.locator("#pages-bar li")).to_have_text(
        [
            "free 95 (95.0%)",
            "in nodes of the tree 2 (2.0%)",
            "in nodes that requests read now 1 (1.0%)",
            "of running requests 2 (2.0%)",
        ]
    )
    expect(tab.get_by_role("treeitem")).to_have_count(3)
    expect(tab.locator("#nodes tbody tr")).to_have_count(3)
    expect(tab.locator("#history figure")).to_have_count(3)
    expect(tab.locator("#counts")).to_contain_text("evictions164 tokens, 0.00 s")
    expect(tab.locator("#problem")).to_be_hidden()


def test_a_block_is_longer_for_more_tokens_and_as_high_as_its_contexts(
    tab: Page, fact_server: FactServer, stats: dict[str, Any]
) -> None:
    stats["nodes"][0]["tokens"] *= 4
    tab.goto(fact_server.url)
    blocks = [tab.locator(f'[data-id="{page}"] .block') for page in (5, 6, 7)]
    for block in blocks:
        expect(block).to_be_visible()  # an element that is being drawn has no box yet
    stem, left, right = (block.bounding_box() for block in blocks)
    assert stem["width"] == pytest.approx(2 * left["width"], rel=0.02) and stem["x"] + stem["width"] == pytest.approx(
        left["x"], abs=2
    )
    assert stem["height"] == pytest.approx(3 * left["height"], rel=0.05)
    assert {left["x"], left["width"]} == {right["x"], right["width"]} and left["y"] != right["y"]


def test_what_users_wrote_is_text_and_nothing_else(tab: Page, fact_server: FactServer, stats: dict[str, Any]) -> None:
    for node in stats["nodes"]:
        node["text"] = HOSTILE
    stats["tier"] = stats["format"] = HOSTILE
    stats["accounting_errors"] = [HOSTILE]
    tab.goto(fact_server.url)
    shown = " ".join(HOSTILE.split())
    expect(tab.locator("#chosen")).to_contain_text(shown)
    expect(tab.locator("#nodes td.text").first).to_have_text(shown)
    expect(tab.locator("#problem")).to_contain_text(HOSTILE)
    expect(tab.locator("#prompts")).to_be_visible()
    assert tab.title() == "DeltaStore"
    assert tab.locator("img").count() == 0 and tab.locator("script").count() == 1
    # Even if markup came through, the policy would not run it.
    # Chromium says so when the markup comes or when it is clicked, by its version.
    with tab.expect_console_message(lambda message: "Content Security Policy" in message.text):
        tab.evaluate("document.body.insertAdjacentHTML('beforeend', '<p onclick=document.title=1 id=in>x</p>')")
        tab.evaluate("document.getElementById('in').click()")
    assert tab.title() == "DeltaStore"


def test_no_text_is_shown_where_none_is_sent(tab: Page, fact_server: FactServer, stats: dict[str, Any]) -> None:
    tab.goto(fact_server.url)
    expect(tab.get_by_role("treeitem")).to_have_count(3)
    expect(tab.locator("#prompts")).to_be_hidden()
    assert tab.locator("#nodes td.text").count() == 0


def test_it_asks_nobody_else(tab: Page, fact_server: FactServer, stats: dict[str, Any]) -> None:
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(fact_server.url)
    expect(tab.get_by_role("treeitem")).to_have_count(3)
    tab.wait_for_timeout(2500)
    assert set(asked) == {fact_server.url, fact_server.url + "/stats"}
    assert asked.count(fact_server.url + "/stats") >= 2
    assert set(fact_server.paths) == {"/deltastore", "/deltastore/stats"}


def test_dear_snapshots_are_asked_for_seldom(tab: Page, fact_server: FactServer, stats: dict[str, Any]) -> None:
    stats["snapshot_seconds"] = 0.1  # every 20 seconds, then
    tab.goto(fact_server.url)
    tab.wait_for_timeout(4500)
    assert fact_server.paths.count("/deltastore/stats") == 1


def test_pause(tab: Page, fact_server: FactServer, stats: dict[str, Any]) -> None:
    tab.goto(fact_server.url)
    pause = tab.get_by_role("button", name="Pause")
    pause.click()
    expect(pause).to_have_attribute("aria-pressed", "true")
    before = fact_server.paths.count("/deltastore/stats")
    tab.wait_for_timeout(3000)
    assert fact_server.paths.count("/deltastore/stats") == before
    pause.click()
    tab.wait_for_timeout(500)
    assert fact_server.paths.count("/deltastore/stats") == before + 1


def test_pause_while_an_answer_is_on_its_way(tab: Page, fact_server: FactServer, stats: dict[str, Any]) -> None:
    fact_server.delay_s = 1.0
    tab.goto(fact_server.url)
    tab.get_by_role("button", name="Pause").click()
    tab.wait_for_timeout(4500)
    assert fact_server.paths.count("/deltastore/stats") == 1


def test_the_keyboard_reaches_every_block_and_keeps_its_place(
    tab: Page, fact_server: FactServer, stats: dict[str, Any]
) -> None:
    tab.goto(fact_server.url)
    expect(tab.get_by_role("treeitem")).to_have_count(3)
    tab.keyboard.press("Tab")
    expect(tab.get_by_role("button", name="Pause")).to_be_focused()
    tab.keyboard.press("Tab")
    expect(tab.locator('[data-id="5"]')).to_be_focused()
    seen = []
    for key in ("ArrowRight", "ArrowDown", "ArrowUp", "ArrowLeft"):
        tab.keyboard.press(key)
        seen.append(tab.evaluate("document.activeElement.dataset.id"))
    assert seen == ["6", "7", "6", "5"]
    tab.keyboard.press("ArrowRight")
    expect(tab.locator("#chosen")).to_contain_text("32 tokens from token 32; 1 contexts of 1 conversations")
    stats["stored_tokens"] += 1
    tab.wait_for_timeout(2500)  # the page has drawn itself anew
    expect(tab.locator('[data-id="6"]')).to_be_focused()


def test_a_server_that_fails_and_comes_back(tab: Page, fact_server: FactServer, stats: dict[str, Any]) -> None:
    fact_server.facts = 503
    tab.goto(fact_server.url)
    expect(tab.get_by_role("alert")).to_have_text("No facts from the server: status 503. Asking again.")
    fact_server.facts = [stats]
    expect(tab.get_by_role("treeitem")).to_have_count(3, timeout=5000)
    expect(tab.locator("#problem")).to_be_hidden()


def test_what_compression_costs_is_shown_where_it_is_measured(
    tab: Page, fact_server: FactServer, stats: dict[str, Any]
) -> None:
    tab.goto(fact_server.url)
    expect(tab.locator("#cards")).to_contain_text("by sharing")
    expect(tab.locator("#canary-cards")).to_contain_text("not measured\N{EN DASH}--kv-compress-canary 0.01")
    stats |= {"canary_share": 0.01}
    expect(tab.locator("#canary-cards")).to_contain_text("no answer has been compared yet")
    part = {"tokens": 40, "kl_mean": 0.0123, "top1_agreement": 0.95, "kl_worst": 0.5}
    stats["canary_by_hit"]["50%"] = stats["canary_by_context"]["4K"] = part
    stats |= {"canary_tokens": 40, "canary_kl_mean": 0.0123, "canary_kl_worst": 0.5, "canary_top1_agreement": 0.95}
    stats["history"]["canary_tokens"] = [10 * at for at in range(31)]
    stats["history"]["canary_kl_nats"] = [0.2 * at for at in range(31)]
    cards = tab.locator("#canary-cards")
    expect(cards).to_contain_text("nats of KL a token0.012the worst 0.5")
    expect(cards).to_contain_text("found stored: up to 50%0.012worst 0.5, 95.0% alike, of 40 tokens")
    expect(cards).to_contain_text("context: up to 4K0.012")
    expect(cards).not_to_contain_text("16K")
    expect(tab.locator("#history figure")).to_have_count(4)
    expect(tab.locator("#history svg").nth(3)).to_have_attribute(
        "aria-label", "KL of answers against raw attention, nats a token, last: 0.02; highest 0.02"
    )


def test_what_more_memory_would_bring(tab: Page, fact_server: FactServer, stats: dict[str, Any]) -> None:
    tab.goto(fact_server.url)
    expect(tab.locator("#cards")).to_contain_text("by sharing")
    expect(tab.locator("#hit-curve")).to_be_hidden()
    rates = {"0_25x": 0.1, "0_5x": 0.2, "1x": 0.352, "2x": 0.6, "4x": 0.8, "8x": 1.0}
    stats |= {f"hit_rate_{size}": rate for size, rate in rates.items()}
    stats |= {"hit_rate_prompt_tokens": 1234, "capacity_tokens": 1_000_000}
    picture = tab.locator("#hit-curve-chart svg")
    expect(picture).to_have_attribute(
        "aria-label",
        "Prompt tokens found stored by memory, 0.25 times: 10.0%, 0.5 times: 20.0%, 1 times: 35.2%, 2 times: 60.0%, "
        "4 times: 80.0%, 8 times: 100.0%",
    )
    expect(tab.locator("#hit-curve-help")).to_contain_text("Of the last 1,234 tokens of prompts")
    expect(picture.locator("text.end")).to_have_text(["35.2%", "now"])
    for tokens in ("250,000", "1M", "8M"):
        expect(picture).to_contain_text(tokens)
    tab.get_by_role("button", name="Pause").click()
    whole, labels = box(picture), [box(label) for label in picture.locator("text").all()]
    for label in labels:
        assert whole["x"] <= label["x"] and label["x"] + label["width"] <= whole["x"] + whole["width"] + 0.5
        assert whole["y"] - 1 <= label["y"] and label["y"] + label["height"] <= whole["y"] + whole["height"] + 1


def test_an_empty_store(tab: Page, fact_server: FactServer, stats: dict[str, Any]) -> None:
    stats |= {name: 0 for name in ("used_bytes", "logical_tokens", "stored_tokens", "nodes_total", "prompt_tokens")}
    stats |= {"nodes": [], "history": {name: [] for name in stats["history"]}}
    tab.goto(fact_server.url)
    expect(tab.locator("#tree")).to_have_text("Nothing is stored yet.")
    cards = tab.locator("#cards")
    expect(cards).to_contain_text("against fp16 without sharing\N{EN DASH}nothing is stored yet")
    expect(cards).to_contain_text("of prompts found stored\N{EN DASH}no request has ended yet")
    for nonsense in ("instead of", "0 B", "NaN", "1.00"):
        expect(cards).not_to_contain_text(nonsense)
    expect(tab.locator("#history figure")).to_have_count(3)


@pytest.mark.parametrize("last", [(1, 0), (100, 99), (99, 100), (100, 100), (99_999_999_999, 99_999_999_998)])
def test_the_ends_of_lines_are_told_apart_and_not_cut_off(
    tab: Page, fact_server: FactServer, stats: dict[str, Any], last: tuple[int, int]
) -> None:
    for name, value in zip(("logical_tokens", "stored_tokens"), last, strict=True):
        stats["history"][name] = [value] * 31
    tab.goto(fact_server.url)
    expect(tab.locator("#history figure")).to_have_count(3)
    tab.get_by_role("button", name="Pause").click()  # it does not draw itself anew while it is measured
    charts = tab.locator("#history svg")
    for at in range(3):
        whole = box(charts.nth(at))
        labels = [box(label) for label in charts.nth(at).locator("text").all()]
        for label in labels:
            assert label["x"] >= whole["x"] and label["x"] + label["width"] <= whole["x"] + whole["width"] + 0.5
            assert label["y"] >= whole["y"] - 1 and label["y"] + label["height"] <= whole["y"] + whole["height"] + 1
        ends = sorted(box(label)["y"] for label in charts.nth(at).locator("text.end").all())
        assert all(below - above > 10 for above, below in pairwise(ends))


def box(locator: Any) -> dict[str, float]:
    found = locator.bounding_box()
    assert found is not None
    return found


def test_the_page_asks_for_a_key(tab: Page, fact_server: FactServer, stats: dict[str, Any]) -> None:
    fact_server.key = "secret"
    tab.goto(fact_server.url)
    expect(tab.get_by_label("The server wants a key")).to_be_focused()
    tab.keyboard.type("wrong")
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("alert")).to_have_text("The server does not know this key.")
    tab.get_by_label("The server wants a key").fill("secret")
    tab.get_by_role("button", name="Open").click()
    expect(tab.get_by_role("treeitem")).to_have_count(3)
    expect(tab.locator("#ask-key")).to_be_hidden()
    expect(tab.get_by_role("alert")).to_be_hidden()
    tab.reload()
    expect(tab.get_by_role("treeitem")).to_have_count(3)
    expect(tab.locator("#ask-key")).to_be_hidden()


def test_a_mirror_that_lost_track_is_told(tab: Page, fact_server: FactServer, stats: dict[str, Any]) -> None:
    stats["untracked_tokens"] = 1234
    tab.goto(fact_server.url)
    expect(tab.locator("#lost")).to_contain_text("1,234 tokens are in nodes that the facts have lost sight of")


def test_two_replicas(tab: Page, fact_server: FactServer, stats: dict[str, Any]) -> None:
    fact_server.facts = [stats, {**stats, "tier": "raw"}]
    tab.goto(fact_server.url)
    expect(tab.locator("#tier")).to_contain_text("tier k4v2")
    tab.get_by_label("Replica").select_option("1")
    expect(tab.locator("#tier")).to_contain_text("tier raw")


def test_many_nodes_on_a_telephone(tab: Page, fact_server: FactServer, stats: dict[str, Any]) -> None:
    """A stem that 2,000 contexts share, of which 63 are shown."""
    stem, leaf = stats["nodes"][0], stats["nodes"][1]
    stem |= {"contexts": 2000, "conversations": 2000, "children": 2000, "tokens": 4096}
    leaves = [{**leaf, "id": 100 + at, "start_tokens": 4096, "tokens": 16 * (1 + at)} for at in range(63)]
    stats |= {"nodes": [stem, *leaves], "nodes_total": 2001}
    tab.set_viewport_size({"width": 360, "height": 740})
    tab.goto(fact_server.url)
    expect(tab.get_by_role("treeitem")).to_have_count(64)
    expect(tab.locator("#tree-more")).to_have_text("64 of 2,001 nodes: those with the most hits, and all above them.")
    expect(tab.locator("#tree .rest title")).to_have_text("1,937 more nodes that are not shown")
    tab.locator("summary").first.click()
    expect(tab.locator("#nodes")).to_be_visible()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("tab", ["light", "dark"], indirect=True)
def test_accessible(tab: Page, fact_server: FactServer, stats: dict[str, Any]) -> None:
    """axe-core's rules: names, roles, contrasts, landmarks."""
    stats["nodes"][0]["text"] = "You answer the customers of a bicycle rental."
    stats["accounting_errors"] = ["1 pages lost (owned by nobody): [4]"]
    stats["hit_rate_prompt_tokens"] = 1234
    tab.goto(fact_server.url)
    expect(tab.get_by_role("treeitem")).to_have_count(3)
    for summary in tab.locator("summary").all():
        summary.click()
    found = Axe().run(tab)
    assert found.violations_count == 0, found.generate_report()
