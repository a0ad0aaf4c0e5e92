"""How long a decode step's attention can take at best: what memory, instruction issue and pipes allow."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu.sass import Loop
from deltastore_kernels.layout import PageLayout


@dataclass(frozen=True)
class Gpu:
    """Peak rates. A scheduler issues one warp instruction a cycle."""

    name: str
    memory_bytes_per_us: float
    schedulers: int
    cycles_per_us: float

    def us(self, cycles: float) -> float:
        """Time of `cycles` of one scheduler's work that is dealt out to all."""
        return cycles / (self.schedulers * self.cycles_per_us)


GPUS = {
    "sm_80": Gpu("A100 SXM 80 GB", 2.039e6, 108 * 4, 1410),
    "sm_90": Gpu("H100 SXM", 3.35e6, 132 * 4, 1755),
}
#: Cycles for which an instruction of one warp takes its pipe. ALU and the special functions: 64 and 16 results a cycle
#: and multiprocessor (CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions"). Tensor cores: 8,192
#: int8 or 4,096 float16 operations at A100's rate; H100's are faster, by how much for mma.sync is not documented.
ALU_CYCLES, SPECIAL_CYCLES, TENSOR_CYCLES = 2, 8, 8

BATCH, CONTEXT_TOKENS, KV_HEADS = 64, 8192, 8
"""One layer of Llama 3 8B, as many requests, each of so many tokens."""
TOKENS_AND_HEADS = BATCH * CONTEXT_TOKENS * KV_HEADS


@dataclass(frozen=True)
class Bounds:
    """Microseconds for one layer."""

    memory_us: float
    issue_us: float
    alu_us: float
    special_us: float
    tensor_us: float

    @property
    def us(self) -> float:
        return max(self.memory_us, self.issue_us, self.alu_us, self.special_us, self.tensor_us)

    @property
    def limit(self) -> str:
        """What takes longest."""
        return max(vars(self), key=vars(self).__getitem__).removesuffix("_us")


def bytes_per_token(layout: PageLayout) -> float:
    """Of one KV head's keys and values in pages, scales and padding included."""
    return layout.page_bytes / (layout.page_tokens * layout.num_kv_heads)


def memory_us(gpu: Gpu, bytes_per_token: float) -> float:
    """bytes_per_token: of one KV head's keys and values."""
    return bytes_per_token * TOKENS_AND_HEADS / gpu.memory_bytes_per_us


def bounds(gpu: Gpu, loop: Loop, tokens_per_warp: float, bytes_per_token: float) -> Bounds:
    """tokens_per_warp: of one KV head, that one warp's round of the loop is worth."""
    rounds = TOKENS_AND_HEADS / tokens_per_warp
    special = loop.classes().get("MUFU", 0)
    return Bounds(
        memory_us(gpu, bytes_per_token),
        gpu.us(rounds * len(loop.instructions)),
        gpu.us(rounds * loop.alu_count * ALU_CYCLES),
        gpu.us(rounds * special * SPECIAL_CYCLES),
        gpu.us(rounds * loop.tensor_count * TENSOR_CYCLES),
    )
