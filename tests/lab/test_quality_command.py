"""`deltastore quality` as a user runs it, on a tiny random model and a tokenizer of single letters."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from sglang_deltastore.cli import main
from sglang_deltastore.lab import plot, quality_command, suites
from sglang_deltastore.lab.provenance import commit_of, provenance
from tests.lab import tiny

FIELDS = {
    "model", "text", "protocol", "config", "source", "bits_per_value", "ratio", "kl_mean", "kl_median", "kl_p999",
    "kl_max", "top1", "ppl_base", "ppl", "grade", "machine", "versions", "commit", "date", "seed", "sequences",
    "tokens", "ratio_resident", "suite",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_folder(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, and back. " * 20)  # 1,100 letters
    return path


def arguments(folder: Path, text: Path, *more: str) -> list[str]:
    return ["quality", "--model", str(folder), "--text", str(text), "--sequences", "2", "--tokens", "80", *more]


def test_a_run_prints_a_table_and_writes_rows_and_a_picture(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    json_path, png_path = tmp_path / "rows.json", tmp_path / "pareto.png"
    assert main(arguments(folder, text, "--json", str(json_path), "--plot", str(png_path))) == 0
    rows = [json.loads(line) for line in json_path.read_text().splitlines()]
    assert {(row["protocol"], row["config"]) for row in rows} == {
        (protocol, tier) for protocol in ("all", "continue") for tier in suites.TIERS
    }
    for row in rows:
        assert set(row) >= FIELDS
        assert (row["model"], row["text"], row["source"]) == ("tiny-llama", "story.txt", "ours")
    printed = capsys.readouterr()
    lines = printed.out.strip().splitlines()
    assert lines[0].startswith("| protocol | source | config | bits | ratio | KL mean |")
    assert len(lines) == 2 + len(rows)
    assert "original" in printed.err  # the progress bar
    with Image.open(png_path) as picture:
        assert picture.width > 800
        assert picture.getpixel((2, 2))[:3] == (255, 255, 255)
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_the_same_seed_gives_the_same_rows(folder: Path, text: Path, tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        path = tmp_path / name
        assert main(arguments(folder, text, "--protocol", "all", "--seed", seed, "--json", str(path))) == 0
        found.append([(row["kl_mean"], row["ppl"]) for row in map(json.loads, path.read_text().splitlines())])
    assert found[0] == found[1] != found[2]


def test_what_evicts_is_left_out_of_protocol_all(
    folder: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suites, "CLAIMS", suites.CLAIMS[1:3])
    assert main(arguments(folder, text, "--suite", "claims", "--protocol", "all")) == 0
    printed = capsys.readouterr()
    assert len(printed.out.strip().splitlines()) == 2 + 2
    assert printed.err.count("left out") == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--suite", "tires"], "--suite tires: unknown; known are tiers, claims, peers, ablations, trellis"),
        (["--tokens", "63"], "--tokens 63: at least 64 are needed"),
        (["--sequences", "0"], "--sequences 0: at least 1"),
        (["--sequences", "14"], "has 1100 tokens; 14 sequences of 80 need 1120; give a longer text"),
        (["--text", "/nowhere/at/all.txt"], "cannot be read as UTF-8 text"),
        (["--model", "/nowhere/at/all"], "no folder with a config.json; give a Hugging Face folder, or one of smollm2"),
        (["--json", "/nowhere/at/all.json"], "--json /nowhere/at/all.json: there is no folder /nowhere/at"),
        (["--plot", "/nowhere/at/all.png"], "--plot /nowhere/at/all.png: there is no folder /nowhere/at"),
    ],
)
def test_wrong_input_is_refused(
    changed: list[str], message: str, folder: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(folder, text), *changed]) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "the file is empty"), (b" \n ", "the file is empty"), (b"\xff\xfe\x00", "UTF-8")]
)
def test_texts_without_text_are_refused(
    content: bytes, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    assert main(arguments(folder, path)) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{}", '{"model_type": "vit"}', "not json"])
def test_folders_without_a_language_model_are_refused(
    content: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(content)
    assert main(arguments(tmp_path, text)) == 1
    assert f"--model {tmp_path}: not a causal language model" in capsys.readouterr().err


def test_models_that_pages_cannot_hold_are_refused(
    text: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "odd"
    tiny.model(544).save_pretrained(odd)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (odd / name).write_bytes((folder / name).read_bytes())
    assert main(arguments(odd, text)) == 1
    assert "head_dim is 544; allowed is at most 512" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_says_what_to_lower(
    error: Exception, folder: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(subject: suites.Subject) -> list:
        raise error

    monkeypatch.setitem(suites.SUITES, "tiers", fail)
    assert main(arguments(folder, text)) == 1
    assert "out of memory with --tokens 80: the logits of one sequence are held; lower" in capsys.readouterr().err


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(subject: suites.Subject) -> list:
        raise RuntimeError("a bug")

    monkeypatch.setitem(suites.SUITES, "tiers", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(arguments(folder, text))


def test_every_suite_of_the_help_exists() -> None:
    assert tuple(suites.SUITES) == quality_command.SUITE_NAMES


def test_the_front_is_what_nothing_beats() -> None:
    points = [(4.0, 0.02), (5.0, 0.10), (6.0, 0.05), (3.0, 0.03), (7.0, 0.20)]
    assert plot._front(points) == [(4.0, 0.02), (6.0, 0.05), (7.0, 0.20)]


def test_a_commit_with_changes_says_so_unless_they_are_results(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        own = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
        return subprocess.run(
            ["git", *own, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    assert commit_of(tmp_path) == ""
    git("init")
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    commit = git("rev-parse", "--short", "HEAD").strip()
    assert commit_of(tmp_path) == commit
    results = tmp_path / "benchmarks/results"
    results.mkdir(parents=True)
    (results / "rows.jsonl").write_text("{}")
    assert commit_of(tmp_path) == commit
    (tmp_path / "code.py").write_text("2")
    assert commit_of(tmp_path) == commit + "+changes"


def test_provenance_names_machine_versions_and_commit() -> None:
    facts = provenance("cpu")
    assert facts["machine"]
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert bool(facts["commit"]) == (Path(__file__).parents[2] / ".git").exists()
