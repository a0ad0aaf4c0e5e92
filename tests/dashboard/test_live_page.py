"""The dashboard of a real server that serves several users, and the pictures of it that the documents show."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import pytest
import requests
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from sglang_deltastore.host.demo.conversation import system_prompt
from sglang_deltastore.host.server_process import Server
from tests.e2e.client import ANSWER_TIMEOUT_S
from tests.e2e.conftest import DELTASTORE, StartServer

pytestmark = pytest.mark.slow

PICTURES = Path(__file__).resolve().parents[2] / "docs" / "images"
PICTURE_BYTES = 100_000
HOSTILE = "<img src=x onerror=\"document.title='owned'\"> is what I typed. Is it safe to show?"

USERS = {
    "Ada": ["I left a red scarf in the basket this morning.", "On the ride from the station to the library."],
    "Ben": ["How much is an hour on a cargo bicycle if I have no plan?", "And with the plan for students?"],
    "Cleo": ["The brake of my bicycle is loose. What shall I do?", "It is number 4711.", "Thank you. Am I charged?"],
    "Dan": ["May I take the bicycle on a train?"],
    "Eve": [HOSTILE],
}
TRANSLATOR = "You are a translator. Translate what the user writes into French, and say nothing else. " * 20


def messages(system: str, *turns: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": "system", "content": system}] + [
        {"role": roles[at % 2], "content": content} for at, content in enumerate(turns)
    ]


def chat(server: Server, said: list[dict[str, str]], tokens: int = 20) -> str:
    body = {"model": "default", "messages": said, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    answer = requests.post(server.url + "/v1/chat/completions", json=body, timeout=ANSWER_TIMEOUT_S)
    answer.raise_for_status()
    return answer.json()["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    """Five customers of one agent with a long tool prompt, and two of a translator."""
    server = start_server(
        *DELTASTORE,
        *("--kv-compress-tier", "k4v2", "--max-total-tokens", "16384", "--max-running-requests", "4"),
        "--kv-compress-show-prompts",
    )
    for questions in USERS.values():
        turns: list[str] = []
        for question in questions:
            turns.append(question)
            turns.append(chat(server, messages(system_prompt(), *turns)))
        if len(questions) == 3:  # Cleo asks her last question anew
            chat(server, messages(system_prompt(), *turns[:4], "Never mind. Where is the next station?"))
    for text in ("Good morning, everybody.", "Where is the station?"):
        chat(server, messages(TRANSLATOR, text))
    return server


@pytest.fixture(scope="module")
def running(server: Server) -> Iterator[None]:
    """Two requests run for as long as the pictures are taken."""
    with ThreadPoolExecutor(2) as clients:
        asked = [
            clients.submit(chat, server, messages(system_prompt(), f"Tell me of plan {plan}."), tokens=400)
            for plan in ("A", "B")
        ]
        while server.store_stats().frames_running < 2 and not any(future.done() for future in asked):
            pass
        yield
        requests.post(server.url + "/abort_request", json={"abort_all": True}, timeout=60).raise_for_status()


@pytest.mark.parametrize("colors", ["light", "dark"])
def test_the_page_of_a_running_server(browser: Browser, server: Server, running: None, colors: str) -> None:
    with browser.new_context(color_scheme=colors, viewport={"width": 1120, "height": 1880}) as context:
        tab, asked = context.new_page(), []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(server.url + "/deltastore")
        expect(tab.locator("#problem")).to_be_hidden()
        expect(tab.locator("#tier")).to_contain_text("tier k4v2 (K4V2)")
        show_the_same(tab, server)
        assert all(url.startswith(server.url + "/deltastore") for url in asked)
        picture = PICTURES / f"dashboard-{colors}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        # Few colors: a fourth of the bytes, and nothing to be seen of it.
        Image.open(BytesIO(tab.screenshot())).convert("RGB").quantize(128).save(picture, optimize=True)
        assert 10_000 < picture.stat().st_size < PICTURE_BYTES


def show_the_same(tab: Page, server: Server) -> None:
    """The page and the JSON, of one moment as near as can be: what does not change while two requests run."""
    stats = server.store_stats()
    nodes = {node.id: node for node in stats.nodes}
    expect(tab.get_by_role("treeitem")).to_have_count(stats.nodes_total)
    tools = max(stats.nodes, key=lambda node: node.hit_tokens)
    assert tools.text and tools.hits >= 9 and tools.running == 2
    assert any("translator" in node.text for node in nodes.values())
    expect(tab.locator(f'[data-id="{tools.id}"]')).to_have_attribute(
        "aria-label", f"{tools.tokens:,} tokens from token 0; {tools.contexts} contexts of {tools.conversations} "
        f"conversations; {tools.hits} hits by {tools.requests} ended requests; 2 running; "
        f"\N{LEFT DOUBLE QUOTATION MARK}{' '.join(tools.text.split())}\N{HORIZONTAL ELLIPSIS}"
        "\N{RIGHT DOUBLE QUOTATION MARK}",
    )  # fmt: skip
    expect(tab.locator("#cards")).to_contain_text(f"{stats.ratio:.2f}\N{MULTIPLICATION SIGN}")
    assert tab.title() == "DeltaStore" and tab.locator("img").count() == 0


def test_prompts_are_their_tokens_and_hostile_ones_are_text(browser: Browser, server: Server) -> None:
    stats = server.store_stats()
    hostile = [node for node in stats.nodes if "onerror" in node.text or "<img" in node.text]
    assert hostile, "no node begins with the hostile prompt: this tested nothing"
    with browser.new_context() as context:
        tab = context.new_page()
        tab.goto(server.url + "/deltastore")
        tab.locator("summary").first.click()
        expect(tab.locator("#nodes")).to_contain_text("<img")
        assert tab.title() == "DeltaStore" and tab.locator("img").count() == 0
