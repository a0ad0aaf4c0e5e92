"""Trellis codes in place of our scalar levels: the same bits for a token's dims, chosen as one path.

A path moves through states by `shift` bits for each dim. What a dim may be decoded to follows from the window of its
own bits and those before it: one of `sets`, whose levels lie wide apart, and with further bits one of the set's levels.
So a dim chooses among more levels than its bits could name, and the encoder finds the path of least cost
(Marcellin and Fischer, "Trellis coded quantization", IEEE Trans. Comm. 38(1), 1990).

Shaped keys (ops/encode/reference.py) compose with it: each state's survivor keeps the errors of its own path, and with
them what its next dim should be rounded to ("per-survivor processing": Raheli, Polydoros and Tzou, IEEE Trans. Comm.
43(2), 1995). With one state this is the greedy rounding that the codec has.

Legend: H heads, N tokens, D dims, S states, B branches into a state, C sets, M levels of a set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from deltastore_kernels import codec
from deltastore_kernels.basis import KeyBasis
from deltastore_kernels.layout import Format

from ..policy.calibration import Calibration
from .ablations import round_scales
from .peers import hadamard

_SMALLEST = 2.0**-40  # as the codec's: keeps log2 finite for all-zero vectors
_ROWS = 4096
"""Tokens whose survivors are kept at once."""

#: memory in bits -> parity checks (h1, h0) of the best amplitude code of that many (Ungerboeck, "Channel coding with
#: multilevel/phase signals", IEEE Trans. Inf. Theory 28(1), 1982, table I). Of a window of memory + 1 path bits, the
#: parity under h1 is the low bit of the set and that under h0 the high one, which solves the check equation.
_CHECKS = {
    2: (0o2, 0o5),
    3: (0o4, 0o13),
    4: (0o4, 0o23),
    6: (0o24, 0o103),
    8: (0o362, 0o515),
}


@dataclass(frozen=True, eq=False)
class Trellis:
    """shift: path bits of a dim. sets [2^(memory + shift)] int64: which set a window of path bits stands for, newest
    lowest. levels [M, C] float32 in units of the vector's RMS: of each set, ascending. Paths begin in state 0."""

    shift: int
    sets: Tensor
    levels: Tensor

    @property
    def states(self) -> int:
        return len(self.sets) >> self.shift

    @property
    def bits(self) -> int:
        """Of a dim: its path bits, and which of the set's levels."""
        return self.shift + len(self.levels).bit_length() - 1

    def decode(self, codes: Tensor) -> Tensor:
        """codes [..., D] uint8, path bits lowest -> levels [..., D] float32."""
        return self.levels.flatten()[self.index(codes)]

    def index(self, codes: Tensor) -> Tensor:
        """codes [..., D] -> where in `levels`, counted through, each dim's is, int64."""
        path, within = codes.long() & ((1 << self.shift) - 1), codes.long() >> self.shift
        window = torch.zeros_like(path)
        for dim in range(codes.shape[-1]):
            before = window[..., dim - 1] if dim else 0
            window[..., dim] = (before << self.shift | path[..., dim]) & (len(self.sets) - 1)
        return within * self.levels.shape[1] + self.sets[window]

    def encode(self, x: Tensor, scale: Tensor, shaping: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [H, N, D] at scale [H, N], shaping [H, D, D] as `KeyBasis` has it -> codes [H, N, D] uint8 and their cost
        [H, N]: the squared error, or what queries see of it."""
        parts = zip(x.split(_ROWS, 1), scale.split(_ROWS, 1), strict=True)
        found = [self._encode(*part, shaping) for part in parts]
        return torch.cat([codes for codes, _ in found], 1), torch.cat([cost for _, cost in found], 1)

    def _encode(self, x: Tensor, scale: Tensor, shaping: Tensor | None) -> tuple[Tensor, Tensor]:
        windows = torch.arange(self.states)[:, None] + self.states * torch.arange(1 << self.shift)  # [S, B], by end
        before, sets = windows >> self.shift, self.sets[windows]
        # Without shaping all survivors want the same, so a dim's choices are worked out once for all of them.
        survivors, choices = (1, sets) if shaping is None else (self.states, before * self.levels.shape[1] + sets)
        target = x.mT  # tokens last, from here on
        wanted = target[:, None].expand(-1, survivors, -1, -1)  # [H, survivors, dims from here on, N]
        levels = self.levels.T[..., None] * scale[:, None, None, None]  # [H, 1, C, M, N]
        cost = x.new_full((len(x), self.states, x.shape[1]), torch.inf)
        cost[:, 0] = 0
        steps = []
        for dim in range(x.shape[-1]):
            distance, nearest = (levels - wanted[:, :, 0, None, None]).abs_().min(3)
            strength = 1.0 if shaping is None else shaping[:, None, None, dim, dim, None]
            added = (distance * strength).square_().flatten(1, 2)
            cost, branch = (cost[:, before] + added[:, choices]).min(2)
            within = _of_branch(nearest.flatten(1, 2)[:, choices], branch)
            steps.append((branch.to(torch.uint8), within.to(torch.uint8)))
            if shaping is None:
                wanted = wanted[:, :, 1:]
                continue
            chosen = within * self.levels.shape[1] + sets[torch.arange(self.states)[:, None], branch]
            error = self.levels.flatten()[chosen] * scale[:, None] - target[:, None, dim]
            wanted = _survivors(wanted[:, :, 1:], before, branch)
            wanted = wanted - shaping[:, None, dim + 1 :, dim, None] * error[:, :, None]
        least, last = cost.min(1)
        return self._traced(steps, last), least

    def _traced(self, steps: Sequence[tuple[Tensor, Tensor]], state: Tensor) -> Tensor:
        """Each dim's branch into every state and index within the set [H, S, N], last states [H, N] -> codes."""
        codes = torch.empty(*state.shape, len(steps), dtype=torch.uint8)
        for dim, step in reversed(list(enumerate(steps))):
            branch, within = (each.gather(1, state[:, None])[:, 0].long() for each in step)
            window = state + self.states * branch
            codes[..., dim] = (within << self.shift) | (window & ((1 << self.shift) - 1))
            state = window >> self.shift
        return codes


def _of_branch(x: Tensor, branch: Tensor) -> Tensor:
    """x [H, S, B, N] -> what belongs to each state's branch [H, S, N]."""
    return x.gather(2, branch[:, :, None])[:, :, 0]


def _survivors(wanted: Tensor, before: Tensor, branch: Tensor) -> Tensor:
    """wanted [H, S, d, N] of the states before -> of those that each state's branch comes from."""
    kept = wanted[:, before[:, 0]]
    for other in range(1, before.shape[1]):
        kept = torch.where(branch[:, :, None] == other, wanted[:, before[:, other]], kept)
    return kept


@lru_cache
@torch.inference_mode(False)
def scalar(bits: int) -> Trellis:
    """One state: the codec's own levels."""
    return Trellis(bits, torch.arange(1 << bits), torch.tensor(codec.levels(bits))[None])


#: bits -> the largest level of a trellis code, in units of the vector's RMS: of least error on Gaussian rows
_LARGEST_LEVEL = {1: 1.20, 2: 1.80, 3: 2.35}


@lru_cache
@torch.inference_mode(False)
def ungerboeck(bits: int, states: int) -> Trellis:
    """One path bit a dim, and the int8 levels of one bit more, in turn in four sets.

    A stored code's path bit stands for two bits of that longer code, its last ones: parities of path bits. What has
    made them decodes as that format does. Levels of their own would gain less than 1% of the error (2 bits) or nothing.
    """
    h1, h0 = _CHECKS[states.bit_length() - 1]
    windows = torch.arange(2 * states)
    levels = torch.tensor(codec.LEVELS_INT8[bits + 1]) * (_LARGEST_LEVEL[bits] / 127)
    return Trellis(1, 2 * _parity(windows & h0) + _parity(windows & h1), levels.view(-1, 4))


@lru_cache
@torch.inference_mode(False)
def bitshift(bits: int, window_bits: int) -> Trellis:
    """All of a dim's bits are path bits, and every window has a level of its own (QTIP, arXiv:2406.11235, section
    3.1), trained from Gaussian ones as its lookup code is."""
    start = torch.randn(1, 1 << window_bits, generator=torch.Generator().manual_seed(0))
    return _trained(Trellis(bits, torch.arange(1 << window_bits), start))


def _parity(x: Tensor) -> Tensor:
    for shift in (8, 4, 2, 1):
        x = x ^ (x >> shift)
    return x & 1


def _trained(trellis: Trellis, rounds: int = 12, rows: int = 2048, dims: int = 64) -> Trellis:
    """Lloyd's two conditions in turn on Gaussian rows: paths for the levels, then the mean of what each level stands
    for. Levels are rounded to int8 as the codec's are."""
    x = torch.randn(1, rows, dims, generator=torch.Generator().manual_seed(1))
    for _ in range(rounds):
        owner = trellis.index(trellis.encode(x, torch.ones(1, rows))[0]).flatten()
        sums = torch.zeros(trellis.levels.numel()).index_add_(0, owner, x.flatten())
        counts = owner.bincount(minlength=trellis.levels.numel())
        means = torch.where(counts > 0, sums / counts.clamp_min(1), trellis.levels.flatten())
        trellis = replace(trellis, levels=means.view(trellis.levels.shape))
    unit = trellis.levels.abs().max() / 127
    return replace(trellis, levels=(trellis.levels / unit).round() * unit)


@dataclass(frozen=True)
class TrellisCodec:
    """Our codec with trellises in place of its levels: as `encode_keys` and `encode_values` do, nibble scales under a
    tile's anchor, keys at the cheapest of three scales, values at unbiased ones, in the calibrated key basis where
    there is one. Sequences' first tokens stay raw, as the store's sinks. Bits leave those out, and the page's padding.

    formats: of each layer; key_states, value_states: of the trellises; 1 and formats of 4 bits take the codec's levels.
    """

    name: str
    formats: tuple[Format, ...]
    key_states: int
    value_states: int
    calibration: Calibration | None = None
    source: str = "ours"

    def bits_per_value(self, head_dim: int) -> float:
        code_bits = sum(fmt.key_bits + fmt.value_bits for fmt in self.formats) / (2 * len(self.formats))
        return code_bits + (4 + 8 / 16) / head_dim  # a nibble for each vector, an anchor for 16 of them

    def apply(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        fmt, turn = self.formats[layer], hadamard(key.shape[-1])
        basis = self.calibration.layers[layer] if self.calibration else None
        keys, values = (
            _trellis(*each) for each in ((fmt.key_bits, self.key_states), (fmt.value_bits, self.value_states))
        )
        seen_key = by_head(key, lambda x: _keys(x, keys, turn, basis))
        seen_value = by_head(value, lambda x: _values(x @ turn, values) @ turn.T)
        return _first_raw(key, seen_key), _first_raw(value, seen_value)


def _first_raw(raw: Tensor, seen: Tensor) -> Tensor:
    return torch.cat((raw[:, :, :1], seen[:, :, 1:]), 2)


def _trellis(bits: int, states: int) -> Trellis:
    return ungerboeck(bits, states) if states > 1 and bits in _LARGEST_LEVEL else scalar(bits)


def by_head(x: Tensor, method: Callable[[Tensor], Tensor]) -> Tensor:
    """`method` of [H, N, D], given x [B, H, T, D] -> [B, H, T, D]."""
    heads = x.transpose(0, 1)
    return method(heads.flatten(1, 2)).reshape(heads.shape).transpose(0, 1)


def _keys(key: Tensor, trellis: Trellis, turn: Tensor, basis: KeyBasis | None) -> Tensor:
    if basis is None:
        return _coded_keys(key @ turn, trellis) @ turn.T
    key_rot = (key - basis.mean[:, None]) @ basis.rotation
    return _coded_keys(key_rot, trellis, basis.shaping) @ basis.query_rotation.mT + basis.mean[:, None]


def _coded_keys(key_rot: Tensor, trellis: Trellis, shaping: Tensor | None = None) -> Tensor:
    """key_rot [H, N, D] -> decoded at the best of three scales."""
    rms = _rms(key_rot)
    decoded, least = key_rot, torch.full(rms.shape[:-1], torch.inf)
    for steps in (0, -1, 1):
        scale = round_scales(rms, "nibble", steps)
        codes, cost = trellis.encode(key_rot, scale[..., 0], shaping)
        better = cost < least
        decoded = torch.where(better[..., None], trellis.decode(codes) * scale, decoded)
        least = torch.where(better, cost, least)
    return decoded


def _values(value_rot: Tensor, trellis: Trellis) -> Tensor:
    """value_rot [H, N, D] -> decoded at scales with <v, v_hat> = <v, v>."""
    rms = _rms(value_rot)
    levels = trellis.decode(trellis.encode(value_rot, rms[..., 0])[0])
    unbiased = value_rot.square().sum(-1, keepdim=True) / (value_rot * levels).sum(-1, keepdim=True).clamp_min(
        _SMALLEST
    )
    scale = round_scales(unbiased, "nibble")
    divisor = rms * scale / unbiased.clamp_min(_SMALLEST)
    return trellis.decode(trellis.encode(value_rot, divisor[..., 0])[0]) * scale


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True).sqrt().clamp_min(_SMALLEST)
