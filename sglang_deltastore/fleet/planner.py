"""How many GPUs a workload needs with each tier, what binds, and what that costs in money, energy, CO2 and water.

A replica is a tensor-parallel group of whole GPUs with its own copy of the weights and of the shared prefix.

    room for KV  = GPUs of the group * memory * (1 - reserve) - weights
    memory       : private tokens * bytes/token + frames  <=  replicas * (room - prefix tokens * bytes/token)
    bandwidth    : weights + active requests of a replica * context * bytes/token
                   <=  GPUs of the group * bandwidth * reached share / tokens a second for each user

A hybrid's state is one more item of fixed size: each resident user keeps one for each branch, each replica one behind
the shared prefix, each active request one that a step reads and writes. Where experts are, a step reads all of them.

The group size is the one that needs the fewest GPUs. Prefill compute is not planned here: `deltastore replay` shows it
for a trace. Attention is assumed to read the shared prefix once for each request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .kv import FP16, KvTier, can_split
from .tables import Figure, Gpu, Model


def _check(name: str, value: float, least: float, most: float = math.inf) -> None:
    if not least <= value <= most or value == math.inf:
        allowed = f"at least {least:g}" if most == math.inf else f"{least:g} to {most:g}"
        raise ValueError(f"{name}={value}: must be {allowed}")


GROWTH_USERS = (100, 1_000, 10_000, 100_000)


@dataclass(frozen=True)
class Workload:
    """Users and their contexts.

    context_tokens        of one user at the end, the shared prefix included
    turns, turn_tokens    of a conversation; turn_tokens is question and answer together
    branches              alternative last turns that each user keeps
    resident_share        of users whose context stays in memory
    active_share          of users for whom a token is being generated at any moment
    tokens_per_s          that each of those must get
    """

    users: int
    shared_prefix_tokens: int = 2048
    turns: int = 8
    turn_tokens: int = 256
    context_tokens: int = 0
    branches: int = 1
    resident_share: float = 1.0
    active_share: float = 0.1
    tokens_per_s: float = 20.0

    def __post_init__(self) -> None:
        if not self.context_tokens:
            object.__setattr__(self, "context_tokens", self.shared_prefix_tokens + self.turns * self.turn_tokens)
        for name in ("users", "turns", "turn_tokens", "branches", "context_tokens"):
            _check(name, getattr(self, name), 1)
        _check("shared_prefix_tokens", self.shared_prefix_tokens, 0, self.context_tokens)
        _check("tokens_per_s", self.tokens_per_s, 1e-9)
        _check("resident_share", self.resident_share, 1e-9, 1)
        _check("active_share", self.active_share, 0, 1)

    @property
    def resident_users(self) -> int:
        return math.ceil(self.users * self.resident_share)

    @property
    def active_requests(self) -> int:
        return math.ceil(self.users * self.active_share)

    @property
    def private_tokens_per_user(self) -> int:
        """What a radix tree stores for a user beyond the shared prefix."""
        return self.context_tokens - self.shared_prefix_tokens + (self.branches - 1) * self.turn_tokens

    @property
    def unshared_tokens_per_user(self) -> int:
        """The same when every branch is a whole sequence of its own."""
        return self.branches * self.context_tokens

    @property
    def snapshot_tokens_per_user(self) -> int:
        """The same when, besides, every turn's context is kept as a snapshot."""
        last, step = self.context_tokens, self.turn_tokens
        return sum(max(last - back * step, 0) for back in range(self.turns)) + (self.branches - 1) * last


@dataclass(frozen=True)
class Assumptions:
    """What no table says. Every one is printed with the plan and is an option of `deltastore plan`."""

    page_tokens: int = 16
    reserve_share: float = 0.12
    bandwidth_share: float = 0.7
    max_tensor_parallel: int = 8
    min_replicas: int = 1

    def __post_init__(self) -> None:
        _check("page_tokens", self.page_tokens, 1)
        _check("reserve_share", self.reserve_share, 0, 0.99)
        _check("bandwidth_share", self.bandwidth_share, 1e-9, 1)
        _check("max_tensor_parallel", self.max_tensor_parallel, 1)
        _check("min_replicas", self.min_replicas, 1)


ASSUMED_BECAUSE = {
    "page_tokens": "the server's default --page-size",
    "reserve_share": "of memory kept for activations and CUDA graphs; SGLang's --mem-fraction-static is about 0.88",
    "bandwidth_share": "of the rated bandwidth that decode reaches",
    "max_tensor_parallel": "GPUs that one server machine couples",
    "min_replicas": "copies of the model that must run in any case",
}


@dataclass(frozen=True)
class Plan:
    """One tier's fleet. Byte figures are of the whole fleet unless they say otherwise."""

    tier: str
    shared: bool
    ratio: float
    bytes_per_token: float
    kv_bytes: float
    weights_bytes: float
    tensor_parallel: int
    replicas_memory: int
    replicas_bandwidth: int
    replicas: int
    gpus: int
    binds: str
    cost_usd_per_year: float
    energy_mwh_per_year: float
    co2_t_per_year: float
    water_l_per_year: float


@dataclass(frozen=True)
class Fleet:
    """What is planned for: everything but the tier and the number of users."""

    model: Model
    gpu: Gpu
    energy: Mapping[str, Figure]
    workload: Workload
    assumptions: Assumptions = Assumptions()

    def with_users(self, users: int) -> Fleet:
        return replace(self, workload=replace(self.workload, users=users))


class DoesNotFit(ValueError):
    """No allowed tensor-parallel group can serve this at all."""


def plan(fleet: Fleet, tier: KvTier, shared: bool = True) -> Plan:
    """The smallest fleet. shared=False: every request stores its whole context, as in the published baselines."""
    candidates = [
        candidate for size in _group_sizes(fleet) if (candidate := _with_group(fleet, tier, shared, size)) is not None
    ]
    if not candidates:
        raise DoesNotFit(_why_not(fleet, tier))
    return min(candidates, key=lambda candidate: (candidate.gpus, candidate.tensor_parallel))


def growth(fleet: Fleet, tiers: Sequence[KvTier], users: Sequence[int] = GROWTH_USERS) -> list[dict[str, Any]]:
    """Plans for more and more users: [{"users": n, "plans": [...]}, ...]; the first plan shares nothing."""
    return [{"users": count, "plans": [asdict(p) for p in plans(fleet.with_users(count), tiers)]} for count in users]


def plans(fleet: Fleet, tiers: Sequence[KvTier]) -> list[Plan]:
    """fp16 with nothing shared, then each tier behind a radix tree."""
    return [plan(fleet, FP16, shared=False), *(plan(fleet, tier) for tier in tiers)]


def footprint(fleet: Fleet, gpus: int) -> dict[str, float]:
    """A year of that many GPUs: money, energy at the meter, CO2, water."""
    hours = fleet.energy["hours_per_year"].value
    it_kwh = gpus * fleet.gpu.power_w * fleet.energy["gpu_load"].value * hours / 1000
    kwh = it_kwh * fleet.energy["pue"].value
    return {
        "cost_usd_per_year": gpus * fleet.gpu.price_usd_per_h * hours,
        "energy_mwh_per_year": kwh / 1000,
        "co2_t_per_year": kwh * fleet.energy["grid_kg_co2_per_kwh"].value / 1000,
        "water_l_per_year": it_kwh * fleet.energy["water_l_per_kwh"].value,
    }


def _group_sizes(fleet: Fleet) -> list[int]:
    sizes, size = [], 1
    while size <= fleet.assumptions.max_tensor_parallel:
        if can_split(fleet.model, size):
            sizes.append(size)
        size *= 2
    return sizes


def _room_bytes(fleet: Fleet, size: int) -> float:
    return size * fleet.gpu.memory_bytes * (1 - fleet.assumptions.reserve_share) - fleet.model.weights_bytes


def _with_group(fleet: Fleet, tier: KvTier, shared: bool, size: int) -> Plan | None:
    """The plan with groups of `size` GPUs, or None when one group cannot hold one user or not reach the speed."""
    work, page, state = fleet.workload, fleet.assumptions.page_tokens, fleet.model.state_bytes
    per_token = tier.bytes_per_token(fleet.model, page, size)
    prefix = work.shared_prefix_tokens * per_token + state if shared else 0.0
    user = (work.private_tokens_per_user if shared else work.unshared_tokens_per_user) * per_token
    user += work.branches * state
    frame = tier.frame_bytes(fleet.model, page, size) + state
    room = _room_bytes(fleet, size) - prefix
    if room < user + frame:
        return None
    needed = work.resident_users * user + work.active_requests * frame
    by_memory = math.ceil(needed / room)
    by_bandwidth = _replicas_by_bandwidth(fleet, per_token, size)
    if by_bandwidth is None:
        return None
    replicas = max(by_memory, by_bandwidth, fleet.assumptions.min_replicas)
    gpus = replicas * size
    return Plan(
        tier=tier.label if shared else f"{tier.label}, nothing shared",
        shared=shared,
        ratio=FP16.bytes_per_token(fleet.model, page, size) / per_token,
        bytes_per_token=per_token,
        kv_bytes=needed + replicas * prefix,
        weights_bytes=replicas * fleet.model.weights_bytes,
        tensor_parallel=size,
        replicas_memory=by_memory,
        replicas_bandwidth=by_bandwidth,
        replicas=replicas,
        gpus=gpus,
        binds=_binds(by_memory, by_bandwidth, fleet.assumptions.min_replicas),
        **footprint(fleet, gpus),
    )


def _replicas_by_bandwidth(fleet: Fleet, bytes_per_token: float, size: int) -> int | None:
    work = fleet.workload
    if not work.active_requests:
        return 0
    step_bytes = size * fleet.gpu.bandwidth_gb_per_s * 1e9 * fleet.assumptions.bandwidth_share / work.tokens_per_s
    request_bytes = work.context_tokens * bytes_per_token + 2 * fleet.model.state_bytes
    most_active = int((step_bytes - fleet.model.weights_bytes) // request_bytes)
    return math.ceil(work.active_requests / most_active) if most_active >= 1 else None


def _binds(by_memory: int, by_bandwidth: int, least: int) -> str:
    if max(by_memory, by_bandwidth) <= least:
        return "the least fleet"
    if by_memory == by_bandwidth:
        return "memory and bandwidth"
    return "memory" if by_memory > by_bandwidth else "decode bandwidth"


def _why_not(fleet: Fleet, tier: KvTier) -> str:
    sizes = _group_sizes(fleet)
    size = sizes[-1]
    usable = _room_bytes(fleet, size) + fleet.model.weights_bytes
    context = fleet.workload.context_tokens * tier.bytes_per_token(fleet.model, fleet.assumptions.page_tokens, size)
    return (
        f"{fleet.model.name} on {fleet.gpu.name}, tier {tier.label}: weights are {fleet.model.weights_bytes / 1e9:.1f} "
        f"GB and one context of {fleet.workload.context_tokens} tokens is {context / 1e9:.1f} GB; the largest group of "
        f"{size} GPUs has {usable / 1e9:.1f} GB after the reserve and must give each user "
        f"{fleet.workload.tokens_per_s:g} tokens/s. Use a larger GPU, a larger --max-tensor-parallel, a shorter "
        "context, a packed tier or a lower --tokens-per-s"
    )
