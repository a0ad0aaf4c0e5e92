"""The documents' tables of what compression costs in the laboratory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from benchmarks.rows import Row, table

#: configuration of quality-smollm2.jsonl -> what a reader is told it is
_PEERS = {
    "KIVI-4 g32 r0": "KIVI-4, groups of 32, nothing raw",
    "llama.cpp q4_0 rotated": "llama.cpp q4_0, rotated",
    "QuaRot INT4": "QuaRot INT4",
    "NVFP4 g16": "NVFP4",
    "TurboQuant vLLM 4bit": "TurboQuant, vLLM's 4bit",
    "Lossless, K4V4 (claimed 4.1x)": "published K4V4, absmax, groups of 64",
    "TurboQuant vLLM 3bit": "TurboQuant, vLLM's 3bit",
    "Conservative, K4V2 (claimed 6.2x)": "published K4V2, absmax, groups of 64",
    "KIVI-2 g32 r0": "KIVI-2, groups of 32, nothing raw",
}
WIKITEXT = "wikitext.txt"
_TEXTS = {
    WIKITEXT: "WikiText-2 test",
    "code.txt": "Python code",
    "chat.txt": "chat, ChatML",
    "tools.txt": "tool schemas, JSON",
    "german.txt": "German prose",
}
_PROTOCOLS = {"all": "all", "continue": "served"}


def quality(rows: Sequence[Row]) -> str:
    """Our tiers and others' methods, dearest first; a method that was not measured as served has no such figure."""
    found = {(row["protocol"], row["config"]): row for row in rows}
    names = {}
    for name in ("lossless", "k4v2", "conservative"):
        names |= {f"{name} calibrated": f"**`{name}`, calibrated**", name: f"`{name}`"}
    lines = []
    for config, told in (names | _PEERS).items():
        row, served = found["all", config], found.get(("continue", config))
        lines.append(
            {
                "configuration": told,
                "bits": f"{row['bits_per_value']:.2f}",
                "ratio": f"{row['ratio']:.2f}",
                "KL, all": f"{row['kl_mean']:.4f}",
                "top-1, all": f"{row['top1']:.3f}",
                "KL, served": f"{served['kl_mean']:.4f}" if served else "",
            }
        )
    return table(lines)


def frontier(rows: Sequence[Row]) -> str:
    """By ratio: KL behind stored tokens at each length, and the thousandth worst token's; blank: not measured."""
    lengths = sorted({row["tokens"] for row in rows})
    found = {(row["config"], row["tokens"]): row for row in rows}
    lines = []
    for first in sorted((row for row in rows if row["tokens"] == lengths[0]), key=lambda row: row["ratio"]):
        line = {"of": first["source"], "configuration": first["config"], "ratio": f"{first['ratio']:.2f}"}
        for tokens in lengths:
            row = found.get((first["config"], tokens))
            line[f"KL, {tokens:,} tokens"] = f"{row['kl_mean']:.4f}" if row else ""
            line[f"99.9%, {tokens:,}"] = f"{row['kl_p999']:.2f}" if row else ""
        lines.append(line)
    return table(lines)


def first_start(rows: Sequence[Row]) -> str:
    """What a server's own calibration brings, by model, protocol and length: without, with."""

    def told(row: Row) -> dict[str, str]:
        where = f" at position {row['first_position']:,}" if row["first_position"] else ""
        return {"protocol": _PROTOCOLS[row["protocol"]], "tokens": f"{row['tokens']:,}{where}"}

    return _by_calibration(rows, told, ("none", "shipped"))


def sunk(rows: Sequence[Row]) -> str:
    """What pages lose that were fine before they became coarse, beside those that never were, and coarser ones."""
    return _by_calibration(
        rows,
        lambda row: {"text": _TEXTS[row["text"]], "tokens": f"{row['tokens']:,}"},
        ("none", "shipped"),
        tiers=("conservative", "adaptive", "k2v2"),
    )


def transfer(rows: Sequence[Row]) -> str:
    """How far it carries, by model and text: without, with, with one on the text's own kind."""
    return _by_calibration(rows, lambda row: {"text": _TEXTS[row["text"]]}, ("none", "shipped", "own"))


def long_context(rows: Sequence[Row]) -> str:
    """A long prompt in chunks, by model and text: half precision, then each tier without a calibration and with."""

    def told(row: Row) -> dict[str, str]:
        return {"text": _TEXTS[row["text"]], "tokens": f"{row['tokens']:,}"}

    return _by_calibration(rows, told, ("none", "shipped"), "bfloat16")


def long_context_by(field: str, told: str) -> Callable[[Sequence[Row]], str]:
    """The same by the end of a range of `field`, over all texts of a model."""

    def render(rows: Sequence[Row]) -> str:
        found: dict[tuple[str, str, str, str], list[float]] = {}
        for row in rows:
            for end, kl in row[field].items():
                found.setdefault((row["model"], end, row["config"], row["calibrated_on"]), []).append(kl)
        ranges = [
            {"model": model, "end": end, "config": config, "calibrated_on": on, "kl_mean": statistics.fmean(kl)}
            for (model, end, config, on), kl in found.items()
        ]
        ranges.sort(key=lambda row: (row["model"] != "smollm2", int(row["end"])))
        return _by_calibration(ranges, lambda row: {told: f"{int(row['end']):,}"}, ("none", "shipped"), "bfloat16")

    return render


def _by_calibration(
    rows: Sequence[Row],
    told: Callable[[Row], dict[str, str]],
    calibrated_on: Sequence[str],
    yardstick: str | None = None,
    tiers: Sequence[str] = ("lossless", "k4v2", "conservative"),
) -> str:
    """KL of each tier by what it is calibrated on, a server's own in bold; before them that of a configuration which is
    no tier."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    found = {}
    for row in rows:
        line = {"model": row["model"], **told(row)}
        lines[tuple(line.values())] = line
        found[(*line.values(), row["config"], row["calibrated_on"])] = f"{row['kl_mean']:.4f}"

    def cell(key: tuple[str, ...], tier: str) -> str:
        figures = [(on, found[(*key, tier, on)]) for on in calibrated_on]
        return ", ".join(f"**{figure}**" if on == "shipped" else figure for on, figure in figures)

    before = {key: {yardstick: found[(*key, yardstick, "none")]} if yardstick else {} for key in lines}
    return table([line | before[key] | {f"`{name}`": cell(key, name) for name in tiers} for key, line in lines.items()])
