"""GPUs, models and energy figures: `data/*.toml`, or files of the same name in a folder of the user's."""

from __future__ import annotations

import tomllib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

DATA = Path(__file__).parent / "data"
Record = TypeVar("Record")


@dataclass(frozen=True)
class Gpu:
    """One row of gpus.toml. Gigabytes are 10**9 bytes."""

    name: str
    memory_gb: float
    bandwidth_gb_per_s: float
    power_w: float
    price_usd_per_h: float
    spec_source: str
    price_source: str

    def __post_init__(self) -> None:
        _positive(self, "memory_gb", "bandwidth_gb_per_s", "power_w", "price_usd_per_h")

    @property
    def memory_bytes(self) -> float:
        return self.memory_gb * 1e9


@dataclass(frozen=True)
class Model:
    """One row of models.toml: what KV and weights need to know of a decoder-only model.

    layers        those that keep keys and values
    state_bytes   of a sequence, whatever its length: what hybrids' other layers keep (Mamba, convolutions)
    """

    name: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    parameters: int
    weight_bytes_per_parameter: float
    source: str
    state_bytes: int = 0

    def __post_init__(self) -> None:
        _positive(self, "layers", "query_heads", "kv_heads", "head_dim", "parameters", "weight_bytes_per_parameter")
        if type(self.state_bytes) is not int or self.state_bytes < 0:
            raise ValueError(f"state_bytes={self.state_bytes!r}: a whole number from 0 is wanted")
        if self.query_heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads}: must divide query_heads={self.query_heads}")

    @property
    def weights_bytes(self) -> float:
        return self.parameters * self.weight_bytes_per_parameter


@dataclass(frozen=True)
class Figure:
    """One row of energy.toml."""

    name: str
    value: float
    unit: str
    source: str

    def __post_init__(self) -> None:
        _positive(self, "value")


def read_table(kind: type[Record], file_name: str, folder: Path | None = None) -> dict[str, Record]:
    """Every row of a table, by name. The user's folder may hold just the tables that differ."""
    path = folder / file_name if folder and (folder / file_name).exists() else DATA / file_name
    return {name: _row(kind, name, row, path.name) for name, row in tomllib.loads(path.read_text()).items()}


def pick(table: dict[str, Record], name: str, what: str) -> Record:
    """The row of that name, whatever its case. Raises ValueError naming the known ones."""
    by_lower = {known.lower(): row for known, row in table.items()}
    if name.lower() not in by_lower:
        raise ValueError(f"{what} {name!r}: unknown; known are {', '.join(table)}")
    return by_lower[name.lower()]


def _row(kind: type[Record], name: str, row: Any, file_name: str) -> Record:
    allowed = {field.name for field in fields(kind)} - {"name"}
    wanted = {field.name for field in fields(kind) if field.default is MISSING} - {"name"}
    if not isinstance(row, dict) or not wanted <= row.keys() <= allowed:
        given = sorted(row) if isinstance(row, dict) else row
        raise ValueError(f"{file_name}, [{name}]: fields {given}; wanted are exactly {sorted(wanted)}")
    try:
        return kind(name=name, **row)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file_name}, [{name}]: {error}") from None


def _positive(record: Any, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise ValueError(f"{name}={value!r}: a number above 0 is wanted")
