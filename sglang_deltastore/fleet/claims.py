"""Published fleet figures against what follows from their own inputs: `data/claims.toml`, derived row by row."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .kv import FP16, parse_tier
from .planner import Fleet, Workload, plan
from .tables import DATA, Figure, Gpu, Model, pick, read_table

DEFAULT_TOLERANCE = 0.01
"""A derived figure that is this close (as a share of the claimed one) follows; published figures are rounded."""

HOURS_PER_YEAR = 8760


@dataclass(frozen=True)
class Checked:
    """One published figure. `reading`: what comes out under the other inputs that `why` explains, if any."""

    scenario: str
    quantity: str
    claimed: float
    derived: float
    reading: float | None
    verdict: str
    why: str


@dataclass(frozen=True)
class Tables:
    """What formulas may look up."""

    gpus: Mapping[str, Gpu]
    models: Mapping[str, Model]
    energy: Mapping[str, Figure]

    @classmethod
    def read(cls, folder: Path | None = None) -> Tables:
        return cls(
            read_table(Gpu, "gpus.toml", folder),
            read_table(Model, "models.toml", folder),
            read_table(Figure, "energy.toml", folder),
        )


def check_claims(folder: Path | None = None) -> list[Checked]:
    """Every row of claims.toml, derived."""
    path = folder / "claims.toml" if folder and (folder / "claims.toml").exists() else DATA / "claims.toml"
    tables = Tables.read(folder)
    return [check(row, tables) for row in tomllib.loads(path.read_text())["claim"]]


def check(row: Mapping[str, Any], tables: Tables) -> Checked:
    """Derive one row. Raises ValueError for a field or a formula that is not known."""
    unknown = row.keys() - _REQUIRED - {"reading", "reading_inputs", "tolerance"}
    if unknown or not row.keys() >= _REQUIRED:
        raise ValueError(f"claims.toml, {row.get('scenario')!r}: unknown {sorted(unknown)}, wanted {sorted(_REQUIRED)}")
    derived = _derive(row["formula"], row["inputs"], tables)
    reading = _derive(row["reading"], row["reading_inputs"], tables) if "reading" in row else None
    allowed = row.get("tolerance", DEFAULT_TOLERANCE) * row["claimed"]
    if abs(derived - row["claimed"]) <= allowed:
        verdict = "follows"
    elif reading is not None and abs(reading - row["claimed"]) <= allowed:
        verdict = "only under another reading"
    else:
        verdict = "does not follow"
    return Checked(row["scenario"], row["quantity"], row["claimed"], derived, reading, verdict, row["why"])


_REQUIRED = {"scenario", "quantity", "claimed", "formula", "inputs", "why"}


def _derive(formula: str, inputs: Mapping[str, Any], tables: Tables) -> float:
    if formula not in _FORMULAS:
        raise ValueError(f"claims.toml: formula {formula!r}: known are {', '.join(_FORMULAS)}")
    try:
        return _FORMULAS[formula](tables, **inputs)
    except TypeError as error:
        raise ValueError(f"claims.toml: formula {formula}: {error}") from None


def _gpus(tables: Tables, model: str, gpu: str, tier: str, users: int, **workload: int) -> float:
    """Our planner, every user's context resident, memory alone (the claims state no decode speed)."""
    work = Workload(users=users, active_share=0.0, **workload)
    fleet = Fleet(pick(tables.models, model, "model"), pick(tables.gpus, gpu, "GPU"), tables.energy, work)
    return plan(fleet, parse_tier(tier)).gpus


def _kv_bytes(tables: Tables, model: str, tier: str, contexts: int, tokens: int) -> float:
    return contexts * tokens * parse_tier(tier).bytes_per_token(pick(tables.models, model, "model"))


def _reduction(tables: Tables, model: str, tier: str, users: int, **workload: int) -> float:
    """fp16 with nothing shared over the tier with the prefix stored once."""
    shape, work = pick(tables.models, model, "model"), Workload(users=users, **workload)
    unshared = users * work.context_tokens * FP16.bytes_per_token(shape)
    tokens = work.shared_prefix_tokens + users * work.private_tokens_per_user
    return unshared / (tokens * parse_tier(tier).bytes_per_token(shape))


def _gpus_of_kv_alone(tables: Tables, gpu: str, **kv: Any) -> float:
    return math.ceil(_kv_bytes(tables, **kv) / pick(tables.gpus, gpu, "GPU").memory_bytes)


def _gpus_of_groups(tables: Tables, model: str, gpu: str, group: int, **kv: Any) -> float:
    """Groups of `group` GPUs, weights counted in each, no working memory."""
    room = group * pick(tables.gpus, gpu, "GPU").memory_bytes - pick(tables.models, model, "model").weights_bytes
    return group * math.ceil(_kv_bytes(tables, model=model, **kv) / room)


def _mwh_per_year(_: Tables, gpus: int, power_w: float, pue: float) -> float:
    return gpus * power_w * HOURS_PER_YEAR * pue / 1e6


_FORMULAS: dict[str, Callable[..., float]] = {
    "gpus": _gpus,
    "gpus_of_kv_alone": _gpus_of_kv_alone,
    "gpus_of_groups": _gpus_of_groups,
    "gpus_of_bytes": lambda tables, gpu, gigabytes: math.ceil(gigabytes / pick(tables.gpus, gpu, "GPU").memory_gb),
    "kv_gb": lambda tables, **kv: _kv_bytes(tables, **kv) / 1e9,
    "kv_mb": lambda tables, **kv: _kv_bytes(tables, **kv) / 1e6,
    "kv_mib_of_one_head": lambda tables, model, **kv: (
        _kv_bytes(tables, model=model, **kv) / pick(tables.models, model, "model").kv_heads / 2**20
    ),
    "weights_gb": lambda tables, model: pick(tables.models, model, "model").weights_bytes / 1e9,
    "reduction": _reduction,
    "usd_per_year": lambda _, gpus, price_usd_per_h: gpus * price_usd_per_h * HOURS_PER_YEAR,
    "mwh_per_year": _mwh_per_year,
    "co2_t": lambda _, mwh, grid_kg_co2_per_kwh: mwh * grid_kg_co2_per_kwh,
    "co2_of_gpus": lambda tables, grid_kg_co2_per_kwh, **gpus: _mwh_per_year(tables, **gpus) * grid_kg_co2_per_kwh,
    "water_l": lambda _, mwh, water_l_per_kwh: mwh * 1000 * water_l_per_kwh,
    "scaled": lambda _, gpus, users, to_users: gpus * to_users / users,
}
