"""What is said of another SGLang, on the installed one with known changes."""

from __future__ import annotations

import pytest

from sglang_deltastore.seam import other_version, targets
from sglang_deltastore.seam.other_version import CODE, GONE, SAME, SIGNATURE, Sources, compare, find, leaned_on

HOOKS = (*targets.LAUNCHER_HOOKS, *targets.SCHEDULER_HOOKS, *targets.DRAFT_HOOKS, *targets.REPLICA_HOOKS)
ALLOCATION = "sglang/srt/mem_cache/allocation.py"
PARAMETERS = "    tree_cache: BasePrefixCache | None,\n) -> list[int]:"


@pytest.fixture(scope="module")
def installed() -> Sources:
    return other_version.installed()


@pytest.fixture(scope="module")
def leaned(installed: Sources) -> dict[str, set[str]]:
    return leaned_on(installed)


def changed(installed: Sources, *replacements: tuple[str, str], path: str = ALLOCATION) -> Sources:
    """The installed one with words of a file replaced, each of which must be there."""

    def read(wanted: str) -> bytes:
        text = installed.read(wanted).decode()
        for old, new in replacements if wanted == path else ():
            assert old in text, f"{path} has no {old!r} any more"
            text = text.replace(old, new, 1)
        return text.encode()

    return Sources(installed.paths, read)


def test_everything_that_we_lean_on_is_found(installed: Sources, leaned: dict[str, set[str]]) -> None:
    """Or it would be missed in no other version either."""
    assert set(HOOKS) <= set(leaned)
    assert [symbol for symbol in leaned if find(installed, symbol) is None] == []
    assert "sglang.srt.mem_cache.pool_host.base.HostKVCache.init_kv_buffer" in leaned, "what we override"


def test_an_sglang_is_the_same_as_itself(installed: Sources, leaned: dict[str, set[str]]) -> None:
    again = Sources(installed.paths, installed.read)
    assert {finding.state for finding in compare(installed, again, leaned)} == {SAME}
    assert "mem_fraction_static" in other_version.options(again)


@pytest.mark.parametrize(
    ("old", "new", "state"),
    [
        ("def alloc_req_slots(", "def alloc_request_slots(", GONE),
        (PARAMETERS, f"    lanes: int,\n{PARAMETERS}", SIGNATURE),
        ("return req_pool_indices", "return list(req_pool_indices)", CODE),
        ("def alloc_req_slots(", "# Slots.\ndef alloc_req_slots(", SAME),
    ],
)
def test_what_became_of_a_hooked_function(installed: Sources, old: str, new: str, state: str) -> None:
    other = changed(installed, (old, new))
    (finding,) = compare(installed, other, {targets.ALLOCATE_ROWS: {"targets.py"}})
    assert (finding.state, finding.used_by) == (state, "targets.py")
    assert finding.names == ("+ lanes: int" if state == SIGNATURE else "")
