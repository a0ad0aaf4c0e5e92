"""SGLang's options as a list of what is allowed: a field that is not on it must keep its default, like most that are.

The list is options.toml. Checked are the options as the user gave them, before SGLang derives others from them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from deltastore_kernels.layout import TILE_TOKENS

from .config import DEFAULT_PAGE_TOKENS

SERVED, DEFAULT, REFUSED = CLASSES = ("served", "default", "refused")

#: the name of SGLang's option, where it is not that of the field
_NAMES = {
    "pp_size": "pipeline-parallel-size",
    "dp_size": "data-parallel-size",
    "tp_size": "tensor-parallel-size",
    "fp8_gemm_runner_backend": "fp8-gemm-backend",
    "fp4_gemm_runner_backend": "fp4-gemm-backend",
    "ep_join_mode": "elastic-ep-join-mode",
    "ep_join_rank_offset": "elastic-ep-join-rank-offset",
}

Given = Mapping[str, Any]
"""Values by field of SGLang's ServerArgs."""


@dataclass(frozen=True)
class Rule:
    """One field of SGLang's ServerArgs: its class, why, what to do instead, and what it may be besides its default."""

    field: str
    kind: str
    why: str
    advice: str
    also: tuple[Any, ...] = ()
    accepts: str | None = None

    @property
    def option(self) -> str:
        """As the user writes it."""
        return "--" + _NAMES.get(self.field, self.field.strip("_").replace("_", "-"))

    def is_allowed(self, given: Given, default: Any) -> bool:
        value = given[self.field]
        if self.accepts:
            return _ACCEPTS[self.accepts][1](value, given)
        is_off = not value and not default
        return self.kind == SERVED or is_off or value in (default, None) or value in self.also

    def allowed(self, default: Any) -> str:
        """What is_allowed allows, in words."""
        if self.accepts:
            return _ACCEPTS[self.accepts][0]
        if self.kind == SERVED:
            return "any value"
        unset = "unset" if default in (None, False, (), []) else str(default)
        *others, last = unset, *map(str, self.also)
        return f"{', '.join(others)} or {last}" if others else last


def _is_whole_tiles(value: int | None, _given: Given) -> bool:
    return value is None or (value > 0 and value % TILE_TOKENS == 0)


def _is_whole_pages(value: int | None, given: Given) -> bool:
    return value is None or value <= 0 or value % (given.get("page_size") or DEFAULT_PAGE_TOKENS) == 0


def _is_behind_host_memory(value: str | None, given: Given) -> bool:
    has_adapters = given.get("enable_lora") or given.get("lora_paths")
    return value is None or (value == "file" and bool(given.get("enable_hierarchical_cache")) and not has_adapters)


DRAFT_MODEL_ALGORITHMS = ("STANDALONE", "EAGLE", "EAGLE3", "NEXTN")
"""Whose drafts a model makes, with a KV cache of its own."""


def of_draft_model(algorithm: str | None) -> bool:
    """Whether drafts come of a model, for a value of --speculative-algorithm."""
    return algorithm in DRAFT_MODEL_ALGORITHMS


def _makes_chains(value: str | None, _given: Given) -> bool:
    return value in (None, "NGRAM", *DRAFT_MODEL_ALGORITHMS)


def _are_steps_of_a_tile(value: int | None, _given: Given) -> bool:
    return value is None or 1 <= value < TILE_TOKENS


def _are_drafts_of_a_tile(value: int | None, _given: Given) -> bool:
    return value is None or 1 < value <= TILE_TOKENS


#: name in options.toml -> what it allows in words, and the test on the value
_ACCEPTS: dict[str, tuple[str, Callable[[Any, Given], bool]]] = {
    "whole tiles": (f"a multiple of {TILE_TOKENS}", _is_whole_tiles),
    "whole pages": (f"-1, or a multiple of --page-size ({DEFAULT_PAGE_TOKENS} tokens unless given)", _is_whole_pages),
    "drafts in chains": (f"NGRAM, {', '.join(DRAFT_MODEL_ALGORITHMS)}, or unset", _makes_chains),
    "steps of a tile": (f"1 .. {TILE_TOKENS - 1}", _are_steps_of_a_tile),
    "drafts of a tile": (f"2 .. {TILE_TOKENS}", _are_drafts_of_a_tile),
    "files behind host memory": (
        "file, together with --enable-hierarchical-cache and without adapters", _is_behind_host_memory
    ),
}  # fmt: skip


@cache
def rules() -> dict[str, Rule]:
    """Every rule, by field."""
    table = tomllib.loads((files(__package__) / "options.toml").read_text())
    found = [rule for kind in CLASSES for group in table[kind] for rule in _rules_of(kind, group)]
    return {rule.field: rule for rule in found}


def _rules_of(kind: str, group: dict[str, Any]) -> Iterator[Rule]:
    advice = group.get("do", "leave it as it is, or serve with --kv-compress none")
    for field in group["options"].split():
        yield Rule(field, kind, group["why"], advice, tuple(group.get("also", ())), group.get("accepts"))


def unknown(field: str) -> Rule:
    """The rule for a field that is on no list: what nobody thought of does not pass."""
    return Rule(field, DEFAULT, "it is not known to DeltaStore", "leave it as it is, or serve with --kv-compress none")


def broken(given: Given, defaults: Given) -> Iterator[Rule]:
    """The rules that the given values break. defaults: what each field is when nothing is given."""
    for field in given:
        rule = rules().get(field) or unknown(field)
        if not rule.is_allowed(given, defaults.get(field)):
            yield rule
