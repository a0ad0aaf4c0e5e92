"""One family measured: raw and lossless against a judge, or the reason why it is not served."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import scores
from .engines import Ended, in_a_child
from .scores import Logprobs, Scores
from .shapes import FAMILIES, Family
from .weights import save

COMMON = {
    "device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, "max_total_tokens": 4096,
    "max_running_requests": 4, "random_seed": 1,
}  # fmt: skip
STOCK = COMMON | {"attention_backend": "torch_native"}
OURS = COMMON | {"kv_compress": "deltastore", "kv_compress_calibration": "none", "chunked_prefill_size": 128}

RAW_NATS = 1e-3
"""Mean |difference| of `raw` that a family may have: float16 keys and values cost 4e-5 to 4e-4."""

LOSSLESS_SHARE = 0.5
"""The same of `lossless`, as a share of what another context costs: random weights feel each bit of K4V3, and a wrong
page costs the whole."""

Row = dict[str, Any]


def row_of(name: str, logs: Path | None = None) -> Row:
    """What was found of a family: its state, the figures or the message. The logs of all its processes are left in the
    folder `logs`."""
    family = FAMILIES[name]
    shape = dict(zip(("query_heads", "kv_heads", "head_dim"), family.heads, strict=True))
    row = {"family": name, "like": family.like, "attention": family.attention, **shape}
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
        try:
            return row | _found(family, Path(folder) / "model", logs / name if logs else Path(folder))
        except Ended as ended:
            return row | {"state": "fault", "message": str(ended)}


def _found(family: Family, folder: Path, logs: Path) -> Row:
    logs.mkdir(parents=True, exist_ok=True)

    def child(what: str, job: Callable[[], Any]) -> Any:
        return in_a_child(job, logs / what)

    child("weights", lambda: save(family, folder))

    def ours(tier: str) -> Scores:
        return child(tier, lambda: scores.measured(folder, OURS | family.options | {"kv_compress_tier": tier}))

    try:
        raw = ours("raw")
    except Ended as ended:
        ask_stock = partial(scores.judged_by_stock, folder, STOCK | family.options, [scores.PROMPT])
        return _not_served(family, ended, lambda: child("stock", ask_stock))
    lossless = ours("lossless")
    continued = [prompt + tokens for prompt, (tokens, _) in zip(scores.ANSWERED, raw.answers, strict=True)]
    sequences = [scores.PROMPT, scores.OTHER, *continued]
    if family.judge == "stock":
        judge = partial(scores.judged_by_stock, folder, STOCK | family.options, sequences)
    else:
        judge = partial(scores.judged_by_transformers, folder, family.auto_class, sequences)
    judged = child(family.judge, judge)
    found = _differences(raw, lossless, judged, getattr(statistics, family.average))
    return {"state": _state(found), "judge": family.judge, "average": family.average, **found}


def _not_served(family: Family, ended: Ended, ask_stock: Callable[[], Any]) -> Row:
    """A refusal at start is one; what else ends our server must end stock's too, and as early."""
    message = str(ended)
    if message.startswith("--kv-compress deltastore") and not ended.had_started:
        return {"state": "gpu only" if family.state == "gpu only" else "refused", "message": message}
    try:
        ask_stock()
    except Ended as of_stock:
        if of_stock.had_started or not ended.had_started:
            return {"state": "not here", "message": str(of_stock)}
    return {"state": "fault", "message": message}


def _differences(
    raw: Scores, lossless: Scores, judged: Sequence[Logprobs], average: Callable[[Sequence[float]], float]
) -> Row:
    cold, other, *continued = judged
    hit, after = cold[scores.HIT_TOKENS :], scores.OTHER_CONTEXT_TOKENS
    answered = [
        difference
        for (_, said), whole, prompt in zip(raw.answers, continued, scores.ANSWERED, strict=True)
        for difference in _differences_of(said, whole[len(prompt) - 1 :])
    ]
    return {
        "raw_cold_nats": average(_differences_of(raw.cold, cold)),
        "raw_cold_nats_max": max(_differences_of(raw.cold, cold)),
        "raw_hit_nats": average(_differences_of(raw.hit, hit)),
        "raw_decode_nats": average(answered),
        "lossless_cold_nats": average(_differences_of(lossless.cold, cold)),
        "lossless_hit_nats": average(_differences_of(lossless.hit, hit)),
        "another_context_nats": average(_differences_of(other[after:], cold[after:])),
    }


def _differences_of(ours: Logprobs, judge: Logprobs) -> list[float]:
    return [abs(a - b) for a, b in zip(ours, judge, strict=True)]


def _state(found: Row) -> str:
    raw = max(found[f"raw_{what}_nats"] for what in ("cold", "hit", "decode"))
    lossless = max(found[f"lossless_{what}_nats"] for what in ("cold", "hit"))
    if raw > RAW_NATS or lossless > LOSSLESS_SHARE * found["another_context_nats"]:
        return "wrong"
    return "served"
