"""--kv-events-config: a router that listens knows what is stored, whichever nodes the tree gives up first."""

from __future__ import annotations

import json

import msgspec
import pytest
import zmq
from sglang.srt.disaggregation.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch

from sglang_deltastore.host.server_process import free_port, stop
from tests.e2e.client import flush, generate, prompt
from tests.e2e.conftest import DELTASTORE, StartServer

pytestmark = pytest.mark.slow

CAPACITY_TOKENS, PAGE_TOKENS = 1024, 16


class Router:
    """What a server's events say that it has: by hash of a page, its tokens."""

    def __init__(self, endpoint: str) -> None:
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.connect(endpoint)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)
        self.stored: dict[int, tuple[int, ...]] = {}
        self.removed_pages = 0

    def listen(self) -> None:
        """Until a second passes without news."""
        while self._socket.poll(1000):
            *_, payload = self._socket.recv_multipart()
            for event in self._decoder.decode(payload).events:
                self._heard(event)

    def _heard(self, event: BlockStored | BlockRemoved | AllBlocksCleared) -> None:
        if isinstance(event, AllBlocksCleared):
            self.stored.clear()
        elif isinstance(event, BlockRemoved):
            for each in event.block_hashes:
                del self.stored[each]
            self.removed_pages += len(event.block_hashes)
        else:
            assert event.block_size == PAGE_TOKENS
            for at, each in enumerate(event.block_hashes):
                self.stored[each] = tuple(event.token_ids[at * PAGE_TOKENS : (at + 1) * PAGE_TOKENS])


#: this one gives up ends of conversations before whole ones
TAILS = ("tlru", "--radix-eviction-policy-config", json.dumps({"threshold": 128, "next_prompt_estimate": 16}))


@pytest.mark.parametrize(
    ("policy", "keeps_what_was_asked_often"),
    [
        (("lru",), False),
        pytest.param(("lfu",), True, marks=pytest.mark.long),
        pytest.param(TAILS, False, marks=pytest.mark.long),
    ],
    ids=["lru", "lfu", "tlru"],
)
def test_a_router_knows_what_is_stored(
    policy: tuple[str, ...], keeps_what_was_asked_often: bool, start_server: StartServer
) -> None:
    port = free_port()
    server = start_server(
        *DELTASTORE, "--max-total-tokens", str(CAPACITY_TOKENS), "--max-running-requests", "2",
        "--radix-eviction-policy", *policy,
        "--kv-events-config", json.dumps({"publisher": "zmq", "endpoint": f"tcp://*:{port}"}),
    )  # fmt: skip
    router = Router(f"tcp://127.0.0.1:{port}")
    router.listen()
    flush(server)
    often = prompt(100, seed=1)
    for _ in range(4):
        generate(server, often)
    for seed in range(2, 12):  # twice what fits
        generate(server, prompt(200, seed), 8)
    router.listen()
    stats = server.settled_stats()
    assert router.removed_pages > CAPACITY_TOKENS // PAGE_TOKENS // 2
    assert len(router.stored) == stats.pages_in_nodes > 0
    assert (stats.census_current, stats.accounting_errors, stats.untracked_tokens) == (True, (), 0)
    knows = tuple(often[:PAGE_TOKENS]) in router.stored.values()
    hit = generate(server, often)["meta_info"]["cached_tokens"] > 0
    assert knows == hit == keeps_what_was_asked_often
    stop(server.process)
