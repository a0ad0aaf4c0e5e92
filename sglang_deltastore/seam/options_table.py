"""docs/options.md: every option of SGLang by class, with reasons.

python -m sglang_deltastore.seam.options_table > docs/options.md
"""

from __future__ import annotations

import sys
from itertools import groupby
from typing import Any

from ..policy.options import CLASSES, DEFAULT, REFUSED, SERVED, Given, Rule, rules
from ..policy.refusals import TESTED_VERSIONS

_TITLES = {
    SERVED: "Served",
    DEFAULT: "Must keep their default",
    REFUSED: "Refused, but for the values named",
}
_INTRODUCTION = f"""# SGLang's options with `--kv-compress deltastore`

Every option of SGLang {TESTED_VERSIONS[-1]}, in three classes. What is given besides what is allowed is refused at
start, with the reason and what to do; a test holds the list
([`options.toml`](../sglang_deltastore/policy/options.toml)) to the fields of SGLang's `ServerArgs`, so that an option
nobody has thought about does not pass. An option that must keep its default is one that nobody has tried together with
DeltaStore, or that has no effect beside what is refused.

This file is made from that list: `python -m sglang_deltastore.seam.options_table > docs/options.md`.
"""


def table(defaults: Given) -> str:
    """The whole file. defaults: values by field of a ServerArgs to which nothing was given."""
    return _INTRODUCTION + "".join(_section(kind, defaults) for kind in CLASSES)


def _section(kind: str, defaults: Given) -> str:
    chosen = [rule for rule in rules().values() if rule.kind == kind]
    lines = [
        "",
        f"## {_TITLES[kind]} ({len(chosen)})",
        "",
        "| options | allowed | why | instead |",
        "|---|---|---|---|",
    ]
    for (why, advice), group in groupby(chosen, key=lambda rule: (rule.why, rule.advice)):
        lines.append(_row(list(group), why, "" if kind == SERVED and "or serve with" in advice else advice, defaults))
    return "\n".join(lines) + "\n"


def _row(group: list[Rule], why: str, advice: str, defaults: Given) -> str:
    allowed = {_allowed(rule, defaults.get(rule.field)) for rule in group}
    words = allowed.pop() if len(allowed) == 1 else "the default"
    return f"| {', '.join(f'`{rule.option}`' for rule in group)} | {words} | {why} | {advice} |"


def _allowed(rule: Rule, default: Any) -> str:
    return "the default" if rule.kind == DEFAULT and not rule.also else rule.allowed(default)


def main() -> int:
    from ..host import activate

    activate()
    from sglang.srt.server_args import ServerArgs

    from .given import fields_of

    sys.stdout.write(table(fields_of(ServerArgs(model_path="any"))[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
