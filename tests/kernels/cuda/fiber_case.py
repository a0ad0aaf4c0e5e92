"""The CUDA kernels on the CPU: compiled by g++, one fiber a thread (fibers.h), called with torch tensors."""

from __future__ import annotations

import ctypes
import hashlib
import math
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from deltastore_kernels.basis import Basis
from deltastore_kernels.context import Scoring
from deltastore_kernels.layout import PACKED_BITS, RAW, Format, PageLayout
from tests.kernels.paged_context import PagedContext

HERE = Path(__file__).parent
KERNELS = Path(__file__).parents[3] / "kernels" / "csrc"
SOURCES = sorted((*HERE.glob("*.h"), *HERE.glob("*.cc"), *KERNELS.glob("include/*/*.h")))
FORMATS = (*(Format(key, value) for key in PACKED_BITS for value in PACKED_BITS), RAW)
FLOAT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# No -ffast-math and no fused multiply-adds but those asked for: what is checked is the kernel, not the compiler.
FLAGS = ("-std=c++17", "-O1", "-shared", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-w")


def build(layout: PageLayout, csrc: Path = KERNELS / "cuda") -> ctypes.CDLL:
    """The kernels of a layout's format and head_dim; `csrc` may hold a changed copy of them."""
    return _build(layout.format, layout.head_dim, csrc)


@cache
def _build(fmt: Format, head_dim: int, csrc: Path) -> ctypes.CDLL:
    defines = {"KEY_BITS": fmt.key_bits, "VALUE_BITS": fmt.value_bits, "HEAD_DIM": head_dim}
    flags = [*FLAGS, *(f"-DDELTASTORE_{name}={value}" for name, value in defines.items())]
    flags += [f"-I{folder}" for folder in (HERE, csrc, KERNELS / "include")]
    sources = (*SOURCES, *sorted(set(csrc.glob("*.cuh")) - {csrc / "kernels.cuh"}))
    content = hashlib.sha256(repr(flags).encode() + b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    # Kept from run to run: a build takes some seconds, and there is one for each format and head_dim.
    folder = Path(tempfile.gettempdir()) / "deltastore-fibers"
    folder.mkdir(exist_ok=True)
    library = folder / f"{fmt}-{head_dim}-{content}.so"
    if not library.exists():
        partial = library.with_suffix(".partial")
        subprocess.run(["g++", *flags, HERE / "harness.cc", "-o", partial], check=True)
        partial.rename(library)
    loaded = ctypes.CDLL(str(library))
    for name in ("attend_decode_on_fibers", "decode_context_on_fibers"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def _context_tensors(context: PagedContext) -> list[torch.Tensor | None]:
    sinks = context.sinks
    return [
        context.pages,
        context.page_table.int(),
        context.packed_tokens.int(),
        context.frame_key_rot,
        context.frame_value_rot,
        context.frame_ids.int(),
        context.frame_tokens.int(),
        *((sinks.key_rot, sinks.value_rot, sinks.ids.int()) if sinks else (None, None, None)),
    ]


def _context_numbers(context: PagedContext) -> list[int]:
    layout, sinks = context.layout, context.sinks
    sink_tokens = sinks.key_rot.shape[2] if sinks else 0
    return [layout.num_kv_heads, layout.page_tokens, context.page_table.shape[1], sink_tokens]


def _call(function: object, tensors: list[torch.Tensor | None], numbers: list[int], *rest: object) -> None:
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    sizes = [0 if tensor is None else tensor.nbytes for tensor in tensors]
    arrays = [(ctypes.c_int64 * len(row))(*row) for row in (pointers, sizes, numbers)]
    if error := function(arrays[0], arrays[1], ctypes.c_int64(len(pointers)), arrays[2], *rest):
        raise RuntimeError(error.decode())


def attend_decode(
    query_rot: torch.Tensor,
    context: PagedContext,
    scoring: Scoring,
    splits: int = 1,
    seed: int = 0,
    library: ctypes.CDLL | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ops/attend_decode/reference.py. Raises RuntimeError for what fibers.h calls an error."""
    return leave(*attend_parts(query_rot, context, scoring, splits, seed, library), query_rot, scoring)


def attend_parts(
    query_rot: torch.Tensor,
    context: PagedContext,
    scoring: Scoring,
    splits: int,
    seed: int = 0,
    library: ctypes.CDLL | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """partial_out [B, Hq, splits, D] and partial_log2 [B, Hq, splits], everything NaN before."""
    batch, query_heads, head_dim = query_rot.shape
    partial_out = torch.full((batch, query_heads, splits, head_dim), float("nan"))
    partial_log2 = torch.full((batch, query_heads, splits), float("nan"))
    tensors = [*_context_tensors(context), query_rot.contiguous(), partial_out, partial_log2]
    window_left = -1 if scoring.window_left is None else scoring.window_left
    group = query_heads // context.layout.num_kv_heads
    numbers = [*_context_numbers(context), FLOAT_TYPES[query_rot.dtype], group, window_left, batch, splits]
    floats = ctypes.c_double(scoring.scale), ctypes.c_double(scoring.soft_cap)
    library = library or build(context.layout)
    _call(library.attend_decode_on_fibers, tensors, numbers, *floats, ctypes.c_int64(seed))
    return partial_out, partial_log2


def leave(
    partial_out: torch.Tensor,
    partial_log2: torch.Tensor,
    query_rot: torch.Tensor,
    scoring: Scoring,
    basis: Basis | None = None,
    sink_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of ops/_triton_leave.py."""
    lse = partial_log2.mul(math.log(2)).logsumexp(-1)
    weights = (partial_log2 - partial_log2.amax(-1, keepdim=True).clamp_min(-1e30)).exp2()[..., None]
    filled = partial_log2[..., None] > -torch.inf
    total = weights.sum(2)
    merged = torch.where(filled, partial_out * weights, 0).sum(2) / torch.where(total == 0, 1, total)
    out_rot = merged.to(query_rot.dtype)
    return out_rot if basis is None else basis.leave(out_rot, lse, query_rot, scoring, sink_logits), lse


def decode_context(
    requests: torch.Tensor, positions: torch.Tensor, context: PagedContext, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored tokens `positions` [rows] of requests [rows] -> key_rot, value_rot [rows, H, D] of dtype."""
    layout = context.layout
    shape = (len(requests), layout.num_kv_heads, layout.head_dim)
    sides = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(2)]
    tensors = [*_context_tensors(context), requests.int(), positions.int(), *sides]
    numbers = [*_context_numbers(context), FLOAT_TYPES[dtype], len(requests)]
    _call(build(layout).decode_context_on_fibers, tensors, numbers)
    return sides[0], sides[1]
