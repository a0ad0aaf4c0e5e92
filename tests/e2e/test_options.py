"""The list of options against the installed SGLang: every field is on it, and each rule holds in its own resolution."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from sglang_deltastore.policy import options
from sglang_deltastore.policy.options import DEFAULT, REFUSED, SERVED, Rule
from sglang_deltastore.policy.refusals import Refused

pytestmark = pytest.mark.slow

RULES = options.rules()

#: fields without an option of their own: SGLang derives them, or takes them from Engine(...) or a variable alone
UNNAMED = {
    "_speculative_draft_quantization_explicitly_set",
    "aux_hidden_state_capture", "enable_cp_tp_group_sharing", "grpc_worker_threads", "speculative_boundary_reduction",
    "stat_loggers", "uses_mamba_radix_cache", "watermark_context_window", "watermark_default_enabled",
    "watermark_enforce_all", "watermark_key", "watermark_key_b", "watermark_max_probability",
    "watermark_mixing_probability",
}  # fmt: skip


@pytest.fixture(scope="module")
def record() -> type:
    """SGLang's ServerArgs, with the plugin."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import ServerArgs

    return ServerArgs


@pytest.fixture(scope="module")
def given(record: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a command line with a model and nothing else gives, and the defaults."""
    from sglang_deltastore.seam.given import fields_of

    parser = argparse.ArgumentParser()
    record.add_cli_args(parser)
    return fields_of(record.from_cli_args(parser.parse_args(["--model-path", "m"])))


def test_every_field_is_on_the_list(record: type) -> None:
    import msgspec

    fields = {field.name for field in msgspec.structs.fields(record)}
    assert fields - set(RULES) == set(), "options that nobody has thought about"
    assert set(RULES) - fields == set(), "SGLang does not have these (any more)"


def test_no_field_is_on_two_lists() -> None:
    import tomllib

    path = Path(options.__file__).with_name("options.toml")
    listed = [
        field
        for groups in tomllib.loads(path.read_text()).values()
        for group in groups
        for field in group["options"].split()
    ]
    assert sorted(listed) == sorted(set(listed))


def test_a_plain_command_line_is_served(given: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert list(options.broken(*given)) == []


def value_besides(rule: Rule, default: Any) -> Any:
    """A value that is neither the default nor off."""
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 17
    return ["something"] if isinstance(default, list) else "something"


@pytest.mark.parametrize("rule", [rule for rule in RULES.values() if rule.kind != SERVED], ids=lambda rule: rule.field)
def test_whatever_must_keep_its_default_is_refused_by_sglangs_own_resolution(
    rule: Rule, given: tuple[dict[str, Any], dict[str, Any]], smollm2: Path
) -> None:
    """Through the launcher's own steps, however early SGLang itself would have objected."""
    from sglang.srt.entrypoints.engine import Engine

    default = given[1][rule.field]
    value = value_besides(rule, default)
    server_args = Engine.server_args_class(
        model_path=str(smollm2), kv_compress="deltastore", device="cpu", **{rule.field: value}
    )
    with pytest.raises(Refused) as refusal:
        server_args.resolve_once()
    message = str(refusal.value)
    assert message.startswith(
        f"--kv-compress deltastore with {rule.option} {value}: allowed is {rule.allowed(default)}"
    )
    assert message.endswith(f", because {rule.why}; {rule.advice}")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("page_size", 24),
        ("chunked_prefill_size", 100),
        ("attention_backend", "triton"),
        ("kv_cache_dtype", "fp8_e5m2"),
        ("hicache_storage_backend", "mooncake"),
    ],
)
def test_rules_of_their_own_hold_as_well(field: str, value: Any, smollm2: Path, record: type) -> None:
    from sglang.srt.entrypoints.engine import Engine

    options_given = {"model_path": str(smollm2), "kv_compress": "deltastore", "device": "cpu", field: value}
    with pytest.raises(Refused, match=f"--{field.replace('_', '-')} {value}: allowed is "):
        Engine.server_args_class(**options_given).resolve_once()


def test_messages_name_options_that_exist(record: type) -> None:
    parser = argparse.ArgumentParser()
    record.add_cli_args(parser)
    known = {name for action in parser._actions for name in action.option_strings}
    by_field = {rule.field: rule.option for rule in RULES.values() if rule.kind in (DEFAULT, REFUSED)}
    wrong = {field for field, option in by_field.items() if option not in known}
    assert wrong == UNNAMED


def test_the_table_in_the_documentation_is_the_list(given: tuple[dict[str, Any], dict[str, Any]]) -> None:
    from sglang_deltastore.seam.options_table import table

    path = Path(__file__).parents[2] / "docs" / "options.md"
    assert path.read_text() == table(given[1]), "run: make options-table"
