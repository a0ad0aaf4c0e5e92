"""What the documents tell a user to type exists; what they point to is there; their figures are the rows'."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from benchmarks import page, tables
from benchmarks.provenance import RESULTS
from benchmarks.serving import report
from sglang_deltastore import cli
from sglang_deltastore.policy.config import KERNELS, MODES
from sglang_deltastore.policy.tiers import SERVED_TIERS

ROOT = Path(__file__).resolve().parents[1]
#: folders that hold what others wrote, or what was made here
FOREIGN = {".venv", ".venv-harness", ".site", ".git", ".gpu-day", ".pytest_cache", "build", "dist", "node_modules"}
DOCUMENTS = sorted(
    str(path.relative_to(ROOT)) for path in ROOT.rglob("*.md") if not FOREIGN & set(path.relative_to(ROOT).parts)
)
OWN_PACKAGES = ("benchmarks", "deltastore_kernels", "sglang_deltastore", "tests")
COMMANDS = {command.name: command for command in cli.COMMANDS}
LONGEST_README = 150
SERVING_PAGES = ("serving", "serving-at-once", "serving-budgets", "serving-fits", "serving-offline", "sharing")
FLAG = re.compile(r"--kv-compress(?:-[a-z]+)*")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def fenced(text: str) -> list[str]:
    """The lines of fences without a language: commands to type as they stand."""
    blocks = [found[2].replace("\\\n", " ") for found in FENCE.finditer(text) if not found[1]]
    return [line for block in blocks for line in block.splitlines()]


def named(text: str) -> list[str]:
    """Code in sentences, where commands may lack what a reader fills in."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def parser_of(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"deltastore {command}")
    importlib.import_module(COMMANDS[command].module).add_arguments(parser)
    return parser


def source_of(module: str) -> Path:
    """The file that `python -m` runs, found without importing what lies around it."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    assert spec is not None and spec.origin is not None, f"there is no package {top}"
    path = Path(spec.origin).parent.joinpath(*rest)
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def slugs(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_exist(document: str) -> None:
    text = text_of(document)
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), flags=re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.MULTILINE)) <= targets
    assert set(re.findall(r"(?:`|\$\(|^)deltastore ([a-z]+)", text, flags=re.MULTILINE)) <= COMMANDS.keys()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    here = (ROOT / document).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(document)):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = here / path if path else ROOT / document
            assert target.exists(), link
            assert not anchor or anchor in slugs(target.read_text()), link


@pytest.mark.parametrize("document", DOCUMENTS)
def test_our_commands_take_the_options_that_documents_give_them(document: str) -> None:
    text = text_of(document)
    for line in fenced(text):
        if line.startswith("deltastore "):
            _, command, *arguments = shlex.split(line, comments=True)
            parser_of(command).parse_args(arguments)  # ends the test with what is wrong
    for line in named(text):
        if found := re.match(r"deltastore ([a-z]+) (.*)", line):
            known = parser_of(found[1]).format_help()
            assert [option for option in re.findall(r"--[a-z][a-z-]+", found[2]) if option not in known] == [], line


@pytest.mark.parametrize("document", DOCUMENTS)
def test_modules_that_documents_run_know_their_options(document: str) -> None:
    for line in [*fenced(text_of(document)), *named(text_of(document))]:
        if found := re.search(r"python3? (?:-W ignore )?-m ([a-z_0-9.]+)(.*)", line):
            source = source_of(found[1])
            assert source.is_file(), line
            if found[1].split(".")[0] in OWN_PACKAGES:
                known = source.read_text()
                assert [option for option in re.findall(r"--[a-z][a-z-]+", found[2]) if option not in known] == [], line


def test_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= LONGEST_README


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_that_documents_name_exist(document: str) -> None:
    assert set(FLAG.findall(text_of(document))) <= set(FLAG.findall(text_of("sglang_deltastore/seam/flags.py")))


def test_readme_lists_every_flag_and_value() -> None:
    text = text_of("README.md")
    assert all(f"`{value}`" in text for value in (*MODES, *SERVED_TIERS, *KERNELS))
    assert set(FLAG.findall(text_of("sglang_deltastore/seam/flags.py"))) <= set(FLAG.findall(text))


def test_readme_names_the_extras_that_can_be_installed() -> None:
    told = re.findall(r"`\[([a-z]+)\]`|pip install '[^'\[]+\[([a-z]+)\]'", text_of("README.md"))
    extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    assert {one or other for one, other in told} == set(extras)


@pytest.mark.parametrize("document", page.DOCUMENTS)
def test_marked_tables_are_the_rows(document: str) -> None:
    text = text_of(document)
    assert len(page.MARKED.findall(text)) == text.count("<!-- table:") == text.count("<!-- end -->") > 0
    assert page.rendered(text) == text, "run: python -m benchmarks.page"


def test_every_table_is_shown_and_no_result_stands_without_rows() -> None:
    shown = [found["name"] for document in page.DOCUMENTS for found in page.MARKED.finditer(text_of(document))]
    assert sorted(shown) == sorted(tables.TABLES)
    left = page.MARKED.sub("", text_of("benchmarks/results/README.md"))
    assert [line for line in left.splitlines() if line.startswith("|")] == []


def test_a_changed_figure_is_seen() -> None:
    text = "a\n<!-- table: tiers -->\n| old |\n<!-- end -->\nb\n"
    made = page.rendered(text)
    assert made.startswith("a\n<!-- table: tiers -->\n| `--kv-compress-tier` |") and made.endswith(
        "|\n<!-- end -->\nb\n"
    )
    assert page.rendered(made) == made
    assert page.rendered(made.replace("5.19x", "5.20x")) == made
    with pytest.raises(KeyError, match="nowhere"):
        page.rendered(text.replace("tiers", "nowhere"))


def test_every_row_is_told_of() -> None:
    """Rows that no page links to are rows that nobody finds."""
    pages = "".join(text_of(document) for document in DOCUMENTS)
    rows = [path.name for path in RESULTS.iterdir() if path.suffix in {".json", ".jsonl"}]
    assert [name for name in rows if f"({name})" not in pages and f"{Path(name).stem}.md)" not in pages] == []


@pytest.mark.parametrize("name", SERVING_PAGES)
def test_pages_of_the_serving_benchmarks_are_the_rows(name: str) -> None:
    rows = [json.loads(line) for line in text_of(f"benchmarks/results/{name}.jsonl").splitlines()]
    assert report.markdown(rows) == text_of(f"benchmarks/results/{name}.md")


def test_nothing_names_a_machine() -> None:
    pattern = re.compile(r"(?<![\w.])/(work|farm|root|home/[a-z]+)/")
    listed = [path for path in ROOT.rglob("*") if path.suffix in {".py", ".md", ".toml", ".sh", ".cpp", ".h", ".patch"}]
    own = [path for path in listed if not FOREIGN & set(path.relative_to(ROOT).parts)]
    assert len(own) > 50
    found = {str(path.relative_to(ROOT)): pattern.findall(path.read_text()) for path in own if path != Path(__file__)}
    assert {name: hits for name, hits in found.items() if hits and not name.startswith("docker/")} == {}
