"""Broken CUDA kernels must not pass on fibers what the real ones pass (test_cuda_attend_decode.py): each line below is
one mistake, made in a copy of csrc/cuda."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from deltastore_kernels.layout import RAW, Format
from tests.kernels.attention_case import Case
from tests.kernels.cpu_case import context_of, query_of
from tests.kernels.cuda import fiber_case
from tests.kernels.test_cuda_attend_decode import agree

pytestmark = pytest.mark.slow  # a build for each mistake: minutes in all

K4V2, K3V2 = Format(4, 2), Format(3, 2)
PLAIN = Case(K4V2, (97, 300), heads=1, group=4)
LONG = Case(K4V2, (700,), heads=1, group=4)  # several blocks for each warp
THREE_BITS = Case(K3V2, (97, 300), heads=1, group=4)
FOUR_BIT_VALUES = Case(Format(3, 4), (97,), heads=1, group=4)
WINDOW = Case(K4V2, (97, 300), heads=1, group=4, window_left=40)
SINKS = Case(K4V2, (97, 300), heads=1, group=4, sink_tokens=4)
MANY_HEADS = Case(K4V2, (97,), heads=2, group=9)
RAW_PAGES = Case(RAW, (97, 300), heads=1, group=4)


@dataclass(frozen=True)
class Mutant:
    what: str
    file: str
    old: str
    new: str
    case: Case = PLAIN
    splits: int = 2

    def __str__(self) -> str:
        return self.what.replace(" ", "-")


MUTANTS = [
    Mutant(
        "no barrier before warps are merged",
        "attend_decode.cuh",
        "  block_barrier();\n  const int splits = grid_size(0)",
        "  const int splits = grid_size(0)",
    ),
    Mutant(
        "no barrier between queries and what takes their place",
        "attend_decode.cuh",
        "  block_barrier();\n  DELTASTORE_UNROLL\n  for (int h = 0; h < 2; ++h) {\n    for (int rows",
        "  DELTASTORE_UNROLL\n  for (int h = 0; h < 2; ++h) {\n    for (int rows",
    ),
    Mutant(
        "a split's blocks overlap", "attend_decode.cuh", "grid_size(0) * kWarps}", "grid_size(0) * kWarps - 1}", LONG
    ),
    Mutant("last block left out", "attend_decode.cuh", "(end_tile + tiles - 1) / tiles; }", "end_tile / tiles; }"),
    Mutant(
        "merge ignores references",
        "attend_decode.cuh",
        "exp2_fast(shared.reference[w][head] - reference)",
        "1.0f",
        LONG,
    ),
    Mutant(
        "a split's logarithm without its reference", "attend_decode.cuh", "reference + log2_precise", "log2_precise"
    ),
    Mutant("frame twice", "attend_decode.cuh", "share.has_turn(tiles_at_once, 0);", "share.warp % 4 == 0;"),
    Mutant("sink skipped", "attend_decode.cuh", "view.sink >= 0 && share", "false && share", SINKS),
    Mutant(
        "sunk tokens read from pages as well", "attend_params.cuh", "view.sunk_tokens = context", "(void)context", SINKS
    ),
    Mutant(
        "window off by one",
        "attend_params.cuh",
        "view.frame_tokens - 1 - window_left",
        "view.frame_tokens - window_left",
        WINDOW,
    ),
    Mutant("first tiles not hidden", "attend_packed.cuh", "position < span.from || position", "position", WINDOW),
    Mutant("tiles after the last not hidden", "attend_packed.cuh", "|| position >= span.to", "", PLAIN),
    Mutant("token order of values", "attend_packed.cuh", "nibbles.odd, 0x5140)", "nibbles.odd, 0x5410)"),
    Mutant(
        "token order of weights",
        "attend_packed.cuh",
        "permute_bytes(first, second, 0x5410)",
        "permute_bytes(first, second, 0x5140)",
    ),
    Mutant(
        "wrong half of the 4-bit table", "unpack.cuh", "& 0x44444444u) | 0x32103210u", "& 0x44444444u) ^ 0x76547654u"
    ),
    Mutant(
        "last bit of 3-bit codes misplaced",
        "unpack.cuh",
        "(last << 2) & 0x30303030u",
        "(last << 4) & 0x30303030u",
        THREE_BITS,
    ),
    Mutant(
        "registers of 4-bit values mixed up",
        "unpack.cuh",
        "((lines_0_1 >> 4) & 0x0F0F0F0Fu)",
        "(lines_0_1 & 0x0F0F0F0Fu)",
        FOUR_BIT_VALUES,
    ),
    Mutant("low bytes of queries dropped", "attend_packed.cuh", "* 256 + low[2 * r + h]", "* 256"),
    Mutant(
        "low bytes of weights dropped",
        "attend_packed.cuh",
        "weights.low[t] = transpose",
        "weights.low[t] = 0 * transpose",
    ),
    Mutant("value scale left out of the sum", "attend_packed.cuh", "exp2_fast(-block.value_log2[i][t])", "1.0f"),
    Mutant(
        "state not shrunk when its reference is raised",
        "attend_state.cuh",
        "out[i][r] *= shrink[r % 2]",
        "out[i][r] *= 1",
        LONG,
    ),
    Mutant(
        "second chunk of heads reads the first's",
        "attend_decode.cuh",
        "* params.group + chunk * kHeads;",
        "* params.group;",
        MANY_HEADS,
    ),
    Mutant(
        "one warp leaves before a barrier",
        "attend_decode.cuh",
        "  merge_warps(state, shared",
        "  if (thread_in_block() >= 96) return;\n  merge_warps(state, shared",
    ),
    Mutant(
        "raw weights in 11 bits",
        "attend_raw.cuh",
        "multiply_half(state.out[2 * block + i], a, low[0], low[1]);",
        "",
        RAW_PAGES,
    ),
    Mutant("rows beyond a frame's end read", "attend_raw.cuh", "if (token < tokens) of[r]", "of[r]", RAW_PAGES),
]


@cache
def passes(case: Case, splits: int, csrc: Path) -> None:
    """Raises where it does not. Once for the kernels as they are, which most mutants are compared with."""
    query, context = query_of(case), context_of(case)
    library = fiber_case.build(context.layout, csrc)
    for seed in range(3):  # a race shows under some schedules only
        agree(fiber_case.attend_decode(query, context, case.scoring, splits, seed, library), case, query)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_broken_kernel_fails(mutant: Mutant, tmp_path: Path) -> None:
    shutil.copytree(fiber_case.KERNELS / "cuda", tmp_path / "cuda")
    broken = tmp_path / "cuda" / mutant.file
    text = broken.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file} no longer has once: {mutant.old}"
    passes(mutant.case, mutant.splits, fiber_case.KERNELS / "cuda")
    broken.write_text(text.replace(mutant.old, mutant.new))
    with pytest.raises((AssertionError, RuntimeError)):
        passes(mutant.case, mutant.splits, tmp_path / "cuda")
