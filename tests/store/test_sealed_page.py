"""A stored page opens as what was sealed, or not at all."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_deltastore.store.sealed_page import HEADER_BYTES, VERSION, Seal, body_bytes
from tests.kernels.test_encode_bad_numbers import DIGEST_OF_CLEAN_TILES

SEAL = Seal("a store")
bodies = st.binary(min_size=1, max_size=200).map(lambda data: torch.frombuffer(bytearray(data), dtype=torch.uint8))
keys = st.text("0123456789abcdef", min_size=1, max_size=64)


@settings(deadline=None)
@given(keys, bodies)
def test_it_opens_as_what_was_sealed(key: str, body: torch.Tensor) -> None:
    sealed = SEAL.seal(key, body)
    assert (len(sealed), body_bytes(sealed)) == (HEADER_BYTES + len(body), len(body))
    opened = SEAL.opened(key, sealed)
    assert opened is not None
    assert torch.equal(opened, body)


@settings(deadline=None)
@given(keys, bodies, st.data())
def test_no_bit_of_it_may_turn(key: str, body: torch.Tensor, data: st.DataObject) -> None:
    sealed = SEAL.seal(key, body)
    place = data.draw(st.integers(0, len(sealed) - 1))
    sealed[place] ^= 1 << data.draw(st.integers(0, 7))
    assert SEAL.opened(key, sealed) is None


@settings(deadline=None)
@given(keys, bodies, st.data())
def test_nothing_of_it_may_be_missing(key: str, body: torch.Tensor, data: st.DataObject) -> None:
    sealed = SEAL.seal(key, body)
    cut = data.draw(st.integers(HEADER_BYTES, len(sealed) - 1))
    assert SEAL.opened(key, sealed[:cut]) is None
    sealed[cut:] = 0  # as of a file whose blocks never came
    assert SEAL.opened(key, sealed) is None or not body[cut - HEADER_BYTES :].any()


@settings(deadline=None)
@given(keys, keys, bodies)
def test_another_pages_bytes_do_not_open(key: str, other: str, body: torch.Tensor) -> None:
    assert (SEAL.opened(other, SEAL.seal(key, body)) is None) == (key != other)


@settings(deadline=None)
@given(keys, bodies)
def test_another_stores_pages_do_not_open(key: str, body: torch.Tensor) -> None:
    assert Seal("another store").opened(key, SEAL.seal(key, body)) is None


def test_other_bytes_have_another_version() -> None:
    """Who changes what the encoder writes changes a digest; a server of an earlier version has left its pages."""
    assert {VERSION: DIGEST_OF_CLEAN_TILES[:16]} == {1: "0366753f7204fedb"}
