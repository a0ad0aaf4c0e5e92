"""`deltastore plan --html`: one self-contained page whose sliders move the picture.

The page computes nothing of its own: it is fed plans for every position of its sliders, made by `planner`.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .kv import KvTier
from .pictures import USERS
from .planner import DoesNotFit, Fleet, plans

CONTEXT_TOKENS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
PREFIX_SHARES = (0.0, 0.25, 0.5, 0.75, 0.9)
ACTIVE_SHARES = (0.02, 0.1, 0.3, 1.0)
_TEMPLATE = Path(__file__).parent / "data" / "plan.html"


def write_page(fleet: Fleet, tiers: Sequence[KvTier], report: dict[str, Any], path: Path) -> None:
    """The page, with its data inside; it asks the network for nothing."""
    data = json.dumps(grid(fleet, tiers, report), separators=(",", ":")).replace("</", "<\\/")
    page = _TEMPLATE.read_text()
    title = html.escape(f"{fleet.model.name} on {fleet.gpu.name}")
    path.write_text(page.replace("{{title}}", title).replace("{{data}}", data))


def grid(fleet: Fleet, tiers: Sequence[KvTier], report: dict[str, Any]) -> dict[str, Any]:
    """GPUs of every tier at every slider position: gpus[context][prefix][active][tier][users], null where a context
    does not fit."""
    names = [result["tier"] for result in report["plans"]]
    gpus = [
        [[_lines(fleet, tiers, context, prefix, active) for active in ACTIVE_SHARES] for prefix in PREFIX_SHARES]
        for context in CONTEXT_TOKENS
    ]
    per_gpu = {name: report["plans"][0][name] / report["plans"][0]["gpus"] for name in _YEARLY}
    return {
        "tiers": names,
        "users": USERS,
        "contexts": CONTEXT_TOKENS,
        "prefix_shares": PREFIX_SHARES,
        "active_shares": ACTIVE_SHARES,
        "gpus": gpus,
        "per_gpu": per_gpu,
        "report": {key: report[key] for key in ("model", "gpu", "energy", "workload", "assumptions")},
    }


_YEARLY = ("cost_usd_per_year", "energy_mwh_per_year", "co2_t_per_year", "water_l_per_year")


def _lines(
    fleet: Fleet, tiers: Sequence[KvTier], context: int, prefix_share: float, active_share: float
) -> list[list[int | None]]:
    workload = replace(
        fleet.workload,
        context_tokens=context,
        shared_prefix_tokens=round(context * prefix_share),
        active_share=active_share,
    )
    here = replace(fleet, workload=workload)
    by_users: list[list[int | None]] = []
    for users in USERS:
        try:
            by_users.append([result.gpus for result in plans(here.with_users(users), tiers)])
        except DoesNotFit:
            by_users.append([None] * (len(tiers) + 1))
    return [list(line) for line in zip(*by_users, strict=True)]
