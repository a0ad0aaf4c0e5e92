"""What the documents tell a user to type exists; what they point to is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.serving import report
from sglang_deltastore import cli
from sglang_deltastore.policy.config import MODES
from sglang_deltastore.policy.tiers import TIERS, tier

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    "README.md",
    "AGENTS.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "patches/README.md",
    "docker/README.md",
    "kernels/DECISIONS.md",
    "kernels/csrc/README.md",
    "sglang_deltastore/observe/dashboard/README.md",
)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_and_links_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.MULTILINE)) <= targets
    commands = {command.name for command in cli.COMMANDS}
    assert set(re.findall(r"(?:`|\$\()deltastore ([a-z]+)", text)) <= commands
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / document).parent.joinpath(link).exists()] == []


def test_readme_lists_every_flag_value() -> None:
    text = (ROOT / "README.md").read_text()
    assert all(f"`{value}`" in text for value in (*MODES, *TIERS))


def test_readme_figures_of_the_tiers_are_the_layouts() -> None:
    text = (ROOT / "README.md").read_text()
    for name in TIERS:
        (layout,) = tier(name).layouts([3], head_dim=64, page_tokens=16)
        (wide,) = tier(name).layouts([8], head_dim=128, page_tokens=16)
        row = next(
            line
            for line in text.splitlines()
            if line.startswith(f"| `{name}`") and "Fields" not in line and line.count("|") == 6
        )
        assert f"| {30 * layout.page_bytes // 16:,} |" in row
        assert f"| {layout.raw_page_bytes / layout.page_bytes:.2f} |" in row
        assert f"| {wide.raw_page_bytes / wide.page_bytes:.2f} |" in row


def test_readme_figures_of_serving_are_the_results() -> None:
    text = (ROOT / "README.md").read_text()
    for name, table in (
        ("serving", report.summary),
        ("serving-budgets", report.budgets),
        ("latency", report.latency),
    ):
        lines = (ROOT / f"benchmarks/results/{name}.jsonl").read_text().splitlines()
        assert table([json.loads(line) for line in lines]) in text, name


def test_nothing_names_a_machine() -> None:
    pattern = re.compile(r"(?<![\w.])/(work|farm|root|home/[a-z]+)/")
    listed = [path for path in ROOT.rglob("*") if path.suffix in {".py", ".md", ".toml", ".sh", ".cpp", ".h", ".patch"}]
    own = [path for path in listed if ".venv" not in path.parts and "build" not in path.parts]
    assert len(own) > 50
    found = {str(path.relative_to(ROOT)): pattern.findall(path.read_text()) for path in own if path != Path(__file__)}
    assert {name: hits for name, hits in found.items() if hits and not name.startswith("docker/")} == {}
