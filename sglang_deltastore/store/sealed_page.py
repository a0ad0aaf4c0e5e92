"""A page that leaves this process: its body behind a header that says whose it is, and tells whether it is whole.

    offset  bytes
         0      8   magic, and VERSION
         8     16   digest of the identity of the store that it belongs to
        24     16   digest of its key: which tokens it holds, and all before them
        40      8   bytes of its body
        48     16   checksum (XXH3-128) of all before it and of the body
        64          body

Integers are little-endian. The checksum finds what disks and killed writers do; it is no signature: whoever can write
where pages lie can make some.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from xxhash import xxh3_128

VERSION = 1
"""Of this header and of what the bytes of a page and of a sink mean: another one for every change to either."""

_NAMED = struct.Struct("<6sH16s16sQ")
HEADER_BYTES = _NAMED.size + xxh3_128().digest_size


@dataclass
class StorageCounts:
    """Pages since the server started; see stats.StoreStats."""

    loaded_pages: int = 0
    written_pages: int = 0
    refused_pages: int = 0


class Seal:
    """Seals and opens the pages of a store. `identity` says all that their bytes follow from but for their tokens."""

    def __init__(self, identity: str) -> None:
        self._identity = xxh3_128(identity.encode()).digest()

    def seal(self, key: str, body: torch.Tensor) -> torch.Tensor:
        """The sealed page [HEADER_BYTES + n] uint8 of a body [n] uint8, both on the host."""
        return torch.cat([torch.frombuffer(bytearray(self._header(key, body)), dtype=torch.uint8), body])

    def opened(self, key: str, sealed: torch.Tensor) -> torch.Tensor | None:
        """The body (a view) of a sealed page, or None where it is not what was sealed under this key."""
        header, body = sealed.split([HEADER_BYTES, len(sealed) - HEADER_BYTES])
        return body if header.numpy().tobytes() == self._header(key, body) else None

    def _header(self, key: str, body: torch.Tensor) -> bytes:
        named = _NAMED.pack(b"DSPAGE", VERSION, self._identity, xxh3_128(key.encode()).digest(), len(body))
        checksum = xxh3_128(named)
        checksum.update(body.contiguous().numpy().data)
        return named + checksum.digest()


def body_bytes(sealed: torch.Tensor) -> int:
    """What a header says of its body's size; true only if the page opens."""
    size: int = _NAMED.unpack(sealed[: _NAMED.size].numpy().tobytes())[-1]
    return size
