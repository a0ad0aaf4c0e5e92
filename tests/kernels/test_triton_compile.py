"""The Triton kernels compile ahead of time for NVIDIA sm_80 .. sm_100 and AMD gfx942; what they spill is known."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import triton

from deltastore_kernels.layout import GPU_HEAD_DIMS, RAW, Format
from deltastore_kernels.ops import _triton_aot as aot

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
K4V2, K3V2 = Format(4, 2), Format(3, 2)
ALLOWED_LOCAL_BYTES = {("attend_rows", "sm_80"): 400}
"""Extend on Ampere has its operands in registers, where Hopper's lie in shared memory: some 2% of its main loop are
spills."""
DECODE_LOCAL_BYTES = {"K4V3": 48, "K2V2": 16, "K2V3": 8, "K2V4": 8, "K3V3": 8, "raw": 136}
"""Of decode at head_dim 128, GQA 4, on sm_90, where ptxas stops at 168 registers; more registers (maxnreg) moved the
spills to K3V2. The CUDA kernels spill nowhere. Formats that are not here, and other targets: none allowed."""


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory):
    """Compiles for real: what another run left is not looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def resources(compiled) -> dict[str, int]:
    """Bytes of local memory (stack and spills) and registers of a thread."""
    if "amdgcn" in compiled.asm:
        fields = dict(re.findall(r"\.(\w+):\s+(\d+)$", compiled.asm["amdgcn"], re.MULTILINE))
        return {"local_bytes": int(fields["private_segment_fixed_size"]), "registers": int(fields["vgpr_count"])}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = (TOOLS / "cuobjdump", "-res-usage", cubin.name)
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"local_bytes": int(fields["STACK"]) + int(fields["LOCAL"]), "registers": int(fields["REG"])}


def check(instantiation: aot.Instantiation, target: str) -> None:
    found = resources(aot.compile_for(instantiation, aot.TARGETS[target]))
    allowed = ALLOWED_LOCAL_BYTES.get((instantiation.kernel.__name__, target), 0)
    if target == "sm_90" and instantiation.name.startswith("attend_own") and "D=128" in instantiation.name:
        allowed = DECODE_LOCAL_BYTES.get(instantiation.name.split()[1], 0)
    assert found["local_bytes"] <= allowed, f"{instantiation} for {target} spills: {found}"


@pytest.mark.parametrize("target", aot.TARGETS)
def test_decode_compiles_everywhere(target: str) -> None:
    check(aot.attend_own(K4V2, 128, 4), target)


@pytest.mark.parametrize("fmt", [K4V2, K3V2], ids=str)
def test_decode_unpacks_with_byte_permutes(fmt: Format) -> None:
    """On NVIDIA, by prmt and 8-bit matrix instructions; without the assembly both tables would be select trees."""
    asm = aot.compile_for(aot.attend_own(fmt, 128, 4), aot.TARGETS["sm_90"]).asm["ptx"]
    assert asm.count("prmt") > 50
    assert re.search(r"mma\.sync\.aligned\.m16n8k32\S*\.s32\.s8\.s8\.s32", asm)


@pytest.mark.parametrize(
    "instantiation", [point for point in aot.a_few() if not point.name.startswith("attend_own")], ids=str
)
def test_every_kernel_compiles(instantiation: aot.Instantiation) -> None:
    check(instantiation, "sm_90")


MORE = [
    *((aot.attend_own(fmt, head_dim, 4), "sm_90") for fmt in aot.FORMATS for head_dim in GPU_HEAD_DIMS),
    *((aot.attend_own(fmt, 128, 4), target) for fmt in aot.FORMATS for target in aot.TARGETS if target != "sm_90"),
    *((aot.attend_own(K4V2, 128, group), "sm_90") for group in (1, 8, 16)),
    *((aot.attend_shared(fmt, 128, 4), target) for fmt in (K4V2, K3V2, RAW) for target in aot.TARGETS),
    *((point, target) for point in aot.a_few()[3:] for target in ("sm_80", "sm_100", "gfx942")),
]


@pytest.mark.long
@pytest.mark.parametrize(("instantiation", "target"), MORE, ids=str)
def test_all_formats_and_targets_compile(instantiation: aot.Instantiation, target: str) -> None:
    check(instantiation, target)


@pytest.mark.slow
def test_a_spill_would_show() -> None:
    """The gate sees one: 64 rows of 256 dims are too much for one warp."""
    crowded = replace(aot.attend_own(RAW, 256, 4), launch=lambda _: {"ROWS": 64, "TILES": 4, "num_warps": 1})
    with pytest.raises(AssertionError, match="spills"):
        check(crowded, "sm_80")
