"""Where gpu-day's pieces run: on a CUDA GPU; or, rehearsed, on a CPU: Triton's kernels in its interpreter, CUDA's on
fibers, FlashInfer in torch, nothing timed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from statistics import median
from typing import Any, TypeVar

import torch

from deltastore_kernels import cuda_build, ops
from deltastore_kernels.ops import Operations

L2_BYTES = 256 << 20
"""More than any GPU's L2: written before each timed call, so that nothing is found there."""
REPEATS = 20

T = TypeVar("T")


class Absent(RuntimeError):
    """What a piece needs is not on this machine: nothing is wrong with ours."""


class WrongAnswer(RuntimeError):
    """A kernel gave something else than its definition."""


@dataclass(frozen=True)
class Machine:
    """`device`: "cuda", or "cpu" where a machine without a GPU rehearses. `bytes_per_us`: what its memory gives, as
    measured here (ceilings.py); None: not known yet."""

    device: str
    bytes_per_us: float | None = None

    @property
    def rehearsed(self) -> bool:
        return self.device == "cpu"

    def size(self, real: T, tiny: T) -> T:
        """What a piece measures, and what it rehearses with."""
        return tiny if self.rehearsed else real

    def operations(self, backend: str) -> Operations:
        """Those of a GPU backend."""
        return ops.load(backend, "cuda")

    @cached_property
    def flush(self) -> torch.Tensor:
        return torch.empty(L2_BYTES, dtype=torch.uint8, device=self.device)

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def captured(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """`step` as a CUDA graph, ready to be replayed: what a server's step has, without Python. It runs once before,
        so that whatever is built or compiled at first use is there."""
        step()
        if self.rehearsed:
            return step
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def us(self, call: Callable[[], Any], captured: bool = True) -> float | None:
        """Median of CUDA events around a call's replays, L2 flushed before each; None where rehearsed. `captured`:
        False for calls that a CUDA graph cannot hold."""
        replay = self.captured(call) if captured else call
        times = [self.elapsed_us(replay, self.flush.zero_) for _ in range(self.size(REPEATS, 1))]
        return None if self.rehearsed else median(times)

    def timed(self, call: Callable[[], Any], moved_bytes: float, captured: bool = True) -> dict[str, Any]:
        """A row's figures of a call whose answer was checked: its time, and the least that its bytes need at the rate
        that was measured on this machine."""
        us, bound = self.us(call, captured), self.bytes_per_us and moved_bytes / self.bytes_per_us
        if us is None:
            return {"bytes": moved_bytes}
        return {"bytes": moved_bytes, "us": us, "bound_us": bound, "x_of_bound": bound and us / bound}

    def elapsed_us(self, call: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
        """Of the device's time, once; 0 where rehearsed."""
        before()
        if self.rehearsed:
            call()
            return 0.0
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    def need_bytes(self, wanted: float, what: str) -> None:
        """Raises Absent where the device has less free memory than that."""
        if not self.rehearsed and wanted > (free := torch.cuda.mem_get_info()[0]):
            raise Absent(f"{what}: needs {wanted / 1e9:.0f} GB of device memory, {free / 1e9:.0f} are free")


def here(rehearse: bool) -> Machine:
    """Raises Absent where there is no GPU and nothing is to be rehearsed."""
    if rehearse:
        _stand_in()
        return Machine("cpu")
    if not torch.cuda.is_available():
        raise Absent("no NVIDIA GPU (torch.cuda.is_available() is False); --rehearse runs everything without one")
    return Machine("cuda")


def _stand_in() -> None:
    """What has to be compiled for a GPU, replaced as the tests replace it."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("rehearsing needs TRITON_INTERPRET=1 in the environment before Python starts")
    import flashinfer

    import tests.kernels.triton_interpreter  # noqa: F401  mends it
    from deltastore_kernels.ops import _flashinfer
    from deltastore_kernels.ops.attend_decode import cuda as decode
    from deltastore_kernels.ops.attend_extend import cuda as extend
    from tests.kernels.cuda.modules import FiberModule, FlashInfer, PagedDecode

    cuda_build.load = cache(FiberModule)
    decode._multiprocessors = lambda device: 8
    extend.flashinfer = _flashinfer.flashinfer = FlashInfer
    flashinfer.BatchDecodeWithPagedKVCacheWrapper = PagedDecode
    torch.set_num_threads(1)  # small tensors: threads would only wait for one another


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """RMS of all elements, relative; NaN stays."""
    got, want = got.float(), want.to(got.device).float()
    return float(((got - want).square().sum() / want.square().sum()).sqrt())


def require(who: str, error: float, allowed: float) -> float:
    """Raises WrongAnswer where an error is larger than allowed, or NaN."""
    if not error <= allowed:
        raise WrongAnswer(f"{who}: error {error:.2e}, allowed {allowed:.0e}")
    return error
