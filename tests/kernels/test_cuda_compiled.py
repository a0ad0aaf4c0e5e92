"""The CUDA kernels compiled by nvcc, without a GPU: nothing spilled, and few enough instructions."""

from __future__ import annotations

from itertools import product

import pytest

from benchmarks.gpu.compiled import ARCHITECTURES, compile_cuda, kernels_of
from benchmarks.gpu.sass import Instruction, main_loop
from benchmarks.gpu.static_report import cuda_row
from deltastore_kernels import cuda_build
from deltastore_kernels.cuda_build import FORMATS, HEAD_DIMS, Kernels
from deltastore_kernels.layout import RAW, Format
from tests import budgets

try:
    cuda_build.cuda_home()
except cuda_build.CudaUnavailable as error:
    pytest.skip(f"the CUDA kernels cannot be compiled here: {error}", allow_module_level=True)

FAST = [(Format(4, 2), 128), (Format(3, 2), 128)]
MORE = [point for point in product(FORMATS, HEAD_DIMS) if point not in FAST]


def check(fmt: Format, head_dim: int, name: str) -> None:
    architecture = ARCHITECTURES[name]
    kernels = kernels_of(compile_cuda(Kernels(fmt, head_dim), architecture), architecture)
    assert set(kernels) == {f"deltastore_{kernel}" for kernel in ("attend_decode", "decode_context")}
    for kernel, compiled in kernels.items():
        assert compiled.local_instructions == 0, kernel
        assert compiled.stack_bytes == 0, kernel
    row = cuda_row(fmt, head_dim, architecture)
    assert row["occupancy_blocks"] >= 2
    assert row["classes"].get("local", 0) == 0
    if not fmt.is_raw:
        assert row["instructions"] <= budgets.GPU_DECODE_INSTRUCTIONS[head_dim]
        assert row["classes"]["tensor"] == head_dim / 128  # of 64 tokens: half for scores, half for sums


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("fmt", "head_dim"), FAST, ids=str)
def test_the_tiers_decode_within_their_budget(fmt: Format, head_dim: int, arch: str) -> None:
    check(fmt, head_dim, arch)
    assert cuda_row(fmt, head_dim, ARCHITECTURES[arch])["instructions"] <= budgets.GPU_DECODE_TIERS_INSTRUCTIONS


@pytest.mark.long
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("fmt", "head_dim"), MORE, ids=str)
def test_every_kernel_compiles_without_spills(fmt: Format, head_dim: int, arch: str) -> None:
    check(fmt, head_dim, arch)


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR6][R2.64] ;
.L_x_2:
        /*0020*/                   IMMA.16832.S8.S8 R8, R4.ROW, R6.COL, RZ ;
        /*0030*/              @!P0 BRA `(.L_x_3) ;
        /*0040*/                   PRMT R9, R8, 0x5140, R9 ;
.L_x_3:
        /*0050*/               @P1 BRA `(.L_x_2) ;
        /*0060*/                   STL [R1], R4 ;
        /*0070*/               @P2 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
"""


def test_the_main_loop_is_the_inner_one_around_the_products() -> None:
    loop = main_loop(SASS)
    assert [instruction.opcode for instruction in loop.instructions] == ["IMMA", "BRA", "PRMT", "BRA"]
    assert loop.classes() == {"tensor": 1, "PRMT": 1, "other": 2}
    assert loop.alu_count == 1
    assert isinstance(loop.instructions[0], Instruction)


def test_code_without_a_loop_is_refused() -> None:
    with pytest.raises(ValueError, match="no loop"):
        main_loop(SASS.replace("IMMA", "FFMA"))


def test_occupancy_is_what_the_tightest_limit_allows() -> None:
    """By hand, for four warps: 168 registers a lane are 21,504 a block; 65,536 hold three."""
    hopper = ARCHITECTURES["sm_90"]
    assert hopper.occupancy_blocks(registers=168, shared_bytes=16640, warps=4) == 3
    assert hopper.occupancy_blocks(registers=32, shared_bytes=50_000, warps=4) == 4
    assert hopper.occupancy_blocks(registers=32, shared_bytes=0, warps=4) == 16
    assert hopper.occupancy_blocks(registers=16, shared_bytes=0, warps=1) == 32


def test_the_report_counts_a_pages_bytes() -> None:
    row = cuda_row(RAW, 128, ARCHITECTURES["sm_90"])
    assert row["bytes"] == 512
    assert row["roofline"]["memory_us"] == row["bf16_us"]
