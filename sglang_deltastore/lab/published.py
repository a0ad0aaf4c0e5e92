"""The published DeltaStore quantizer, as its reports describe it: the row that ours must beat."""

from __future__ import annotations

from functools import partial

from . import peers


def absmax(key_bits: int, value_bits: int, group: int = 64) -> peers.Codec:
    """Hadamard rotation per head, then absmax-symmetric codes in groups of `group` channels of one token.

    Source: DeltaStore technical report, part IV, quality tiers ("rotation + symmetric"). A b-bit code
    has 2^b - 1 levels, so 2-bit values are -1, 0 or 1 times the scale. Scales are counted as float16;
    the published ratios count no metadata and exceed what the codes alone allow (16 / 3 for K4V2).
    """
    return peers.Codec(
        f"absmax K{key_bits}V{value_bits} g{group}", "published", _part(key_bits, group), _part(value_bits, group)
    )


def _part(bits: int, group: int) -> peers.Part:
    return peers.Part(partial(peers.absmax, bits=bits), bits, peers.FP16_BITS, group, rotation=peers.hadamard)
