"""GPUs, models and energy figures: `data/*.toml`, or files of the same name in a folder of the user's."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, fields
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
    """One row of models.toml: what KV and weights need to know of a decoder-only model."""

    name: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    parameters: int
    weight_bytes_per_parameter: float
    source: str

    def __post_init__(self) -> None:
        _positive(self, "layers", "query_heads", "kv_heads", "head_dim", "parameters", "weight_bytes_per_parameter")

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


def model_from_config(path: Path, weight_bytes_per_parameter: float = 2) -> Model:
    """Read a Hugging Face config.json (or its folder). Parameters are counted for Llama-like dense models; others are
    refused, since their weights or their KV are not what the count assumes."""
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a Hugging Face config.json: {error}") from None
    foreign = [key for key in _FOREIGN if config.get(key)]
    if foreign:
        raise ValueError(
            f"{path}: {', '.join(foreign)} say that this is no dense model with plain K and V in every layer; give its "
            "layers, kv_heads, head_dim and parameters in a models.toml and pass --tables FOLDER"
        )
    try:
        hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or hidden // heads
        feed_forward, vocabulary = config["intermediate_size"], config["vocab_size"]
    except KeyError as missing:
        raise ValueError(f"{path}: {missing} is missing; is this a decoder-only model's config.json?") from None
    attention = hidden * head_dim * 2 * (heads + kv_heads)
    biases = head_dim * (heads + 2 * kv_heads) if config.get("model_type") == "qwen2" else 0
    layer = attention + biases + 3 * hidden * feed_forward + 2 * hidden
    embeddings = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
    parameters = embeddings + layers * layer + hidden
    name = path.parent.name or "model"
    return Model(name, layers, heads, kv_heads, head_dim, parameters, weight_bytes_per_parameter, f"{path.name}")


_FOREIGN = ("num_experts", "num_local_experts", "n_routed_experts", "kv_lora_rank", "is_encoder_decoder")


def _row(kind: type[Record], name: str, row: Any, file_name: str) -> Record:
    wanted = {field.name for field in fields(kind)} - {"name"}
    if not isinstance(row, dict) or row.keys() != wanted:
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
