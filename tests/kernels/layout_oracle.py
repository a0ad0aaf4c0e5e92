"""The address of every code, spelled out one element at a time from layout.py's docstring.

Shares no code with packing.py: plain Python, no tensors, only the constants of layout.py.
"""

from __future__ import annotations

from deltastore_kernels.layout import PLANES


def line_and_byte(side: str, token: int, dim: int) -> tuple[int, int]:
    """Where the code of (token, dim) of a tile lies: line, and byte of the line."""
    if side == "key":
        return dim // 4, 4 * token + dim % 4
    return 4 * (dim // 16) + token // 4, 4 * (dim % 16) + token % 4


def read_code(packed: bytes, side: str, bits: int, head_dim: int, token: int, dim: int) -> int:
    """One code of a packed tile."""
    line, byte = line_and_byte(side, token, dim)
    code, plane_begin = 0, 0
    for width in PLANES[bits]:
        lines_per_register = 8 // width
        register, place = divmod(line, lines_per_register)
        digit = packed[plane_begin + 64 * register + byte] >> (place * width) & (2**width - 1)
        code = code << width | digit
        plane_begin += 16 * head_dim * width // 8
    return code


def read_codes(packed: bytes, side: str, bits: int, head_dim: int) -> list[list[int]]:
    """All codes of a packed tile: [16][head_dim]."""
    return [[read_code(packed, side, bits, head_dim, token, dim) for dim in range(head_dim)] for token in range(16)]
