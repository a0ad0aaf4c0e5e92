"""The layout and the codec that the C++ kernels were compiled with are those of layout.py and codec.py."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product

import pytest
import torch

from deltastore_kernels import codec, native
from deltastore_kernels.layout import PACKED_BITS, RAW, SCALE_NIBBLES, Format, PageLayout
from tests.kernels.cpu_case import ISAS
from tests.kernels.head_dims import HEAD_DIMS

FORMATS = [*(Format(*bits) for bits in product(PACKED_BITS, repeat=2)), RAW]


@pytest.mark.parametrize(("fmt", "head_dim"), list(product(FORMATS, HEAD_DIMS)), ids=str)
def test_page_layout(fmt: Format, head_dim: int) -> None:
    for heads, page_tokens in ((1, 16), (3, 48), (8, 64), (5, 1024)):
        layout = PageLayout(fmt, heads, head_dim, page_tokens)
        fields = [number for field in layout.field_offsets_bytes.values() for number in field]
        assert native.page_layout_sizes(layout) == [layout.tiles, *fields, layout.page_bytes]


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_codec(bits: int) -> None:
    levels, unit, anchors, factors = native.codec_numbers(bits)
    assert tuple(levels) == codec.LEVELS_INT8[bits]
    assert unit == codec.LEVEL_UNIT[bits]
    assert anchors == torch.tensor([2 ** codec.anchor_log2(a) for a in range(256)]).tolist()
    assert len(factors) == SCALE_NIBBLES
    assert factors == torch.tensor(codec.nibble_factors()).tolist()


def ask_in_a_new_process(isa: str, code: str) -> subprocess.CompletedProcess:
    command, environment = [sys.executable, "-c", code], os.environ | {"DELTASTORE_CPU": isa}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_environment_chooses_the_instruction_set() -> None:
    """Asked without torch, which takes seconds to load."""
    load = f"import ctypes; library = ctypes.CDLL({str(native.LIBRARY)!r})"
    code = f"{load}; library.deltastore_isa.restype = ctypes.c_char_p; print(library.deltastore_isa().decode())"
    assert ask_in_a_new_process(ISAS[-1], code).stdout.strip() == "portable"
    assert ask_in_a_new_process("", code).stdout.strip() == ISAS[0]


def test_an_unknown_instruction_set_is_refused() -> None:
    refused = ask_in_a_new_process("avx1024", "from deltastore_kernels import ops; ops.load('cpu')")
    assert refused.returncode != 0
    assert "DELTASTORE_CPU=avx1024" in refused.stderr
    assert "portable" in refused.stderr
    with pytest.raises(ValueError, match="avx1024"):
        native.use_isa("avx1024")
