"""`deltastore calibrate` as a user runs it, on a tiny random model and a tokenizer of single letters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_deltastore.cli import main
from sglang_deltastore.lab import attention, collecting
from sglang_deltastore.lab.quality import sequences
from sglang_deltastore.lab.quality_command import load_model
from sglang_deltastore.policy import calibration
from sglang_deltastore.policy.moments import key_bases
from sglang_deltastore.policy.tiers import TIERS
from tests.lab import tiny


@pytest.fixture(scope="module")
def long_reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads 8,192 tokens."""
    return tiny.save_folder(tmp_path_factory.mktemp("models") / "long", max_position_embeddings=8192)


@pytest.fixture(scope="module")
def short_reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads 512 tokens."""
    return tiny.save_folder(tmp_path_factory.mktemp("models") / "short", max_position_embeddings=512)


def text_of(folder: Path, letters: int) -> Path:
    path = folder / "story.txt"
    path.write_text(("the quick brown fox jumps over the lazy dog, and back. " * (letters // 50))[:letters])
    return path


def calibrate(model: Path, text: Path, *more: str) -> int:
    output = text.parent / "made.safetensors"
    return main(["calibrate", "--model", str(model), "--text", str(text), "-o", str(output), *more])


def test_the_default_reads_long_sequences_and_keeps_one_format(long_reader: Path, tmp_path: Path) -> None:
    assert calibrate(long_reader, text_of(tmp_path, 8200)) == 0
    made = calibration.load(tmp_path / "made.safetensors")
    assert (len(made.layers), made.formats) == (tiny.LAYERS, {})


def test_sequences_are_as_long_as_the_model_reads_up_to_1024(
    long_reader: Path, short_reader: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """8,192 tokens in all: 8 x 1,024, or 16 x 512 where the model reads no more."""
    text = text_of(tmp_path, 8000)
    for model, need in (
        (long_reader, "8 sequences of 1024 need 8192"),
        (short_reader, "16 sequences of 512 need 8192"),
    ):
        assert calibrate(model, text) == 1
        assert need in capsys.readouterr().err
    assert calibrate(short_reader, text, "--sequences", "3") == 0
    assert calibrate(short_reader, text, "--tokens", "513") == 1
    assert "--tokens 513: the model reads at most 512" in capsys.readouterr().err


def test_bits_by_layer_are_dealt_where_asked_for(short_reader: Path, tmp_path: Path) -> None:
    assert calibrate(short_reader, text_of(tmp_path, 800), "--tokens", "256", "--sequences", "1", "--by-layer") == 0
    formats = calibration.load(tmp_path / "made.safetensors").formats
    assert set(formats) == {name for name, tier in TIERS.items() if not tier.format.is_raw}
    assert all(len(by_layer) == tiny.LAYERS for by_layer in formats.values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--tokens", "255"], "--tokens 255: at least 256 are needed"),
        (["--tokens", "0"], "--tokens 0: at least 256 are needed"),
        (["--sequences", "0"], "--sequences 0: at least 1 is needed"),
        (["--context-length", "100"], "--context-length 100: at least 256 are needed"),
        (["--context-length", "513"], "--context-length 513: the model reads at most 512"),
    ],
)
def test_wrong_sizes_are_refused(
    changed: list[str], message: str, short_reader: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate(short_reader, text_of(tmp_path, 800), *changed) == 1
    assert message in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_refused(
    short_reader: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = text_of(tmp_path, 800)
    assert calibrate(short_reader, text, "--tokens", "256", "--sequences", "1", "-o", str(text / "made")) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_moments_do_not_depend_on_how_queries_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do the outputs, which the next layer's keys follow from."""
    model, ids = tiny.model(), tiny.token_ids(1, 70)
    plain = model(ids).logits
    found = []
    for rows in (70, 16):
        monkeypatch.setattr(attention, "QUERY_ROWS", rows)
        with torch.inference_mode(), collecting.collecting(model) as layers:
            torch.testing.assert_close(model(ids, use_cache=False).logits, plain, rtol=1e-4, atol=1e-4)
        found.append([(layer.tokens, layer.key_products, layer.query_products) for layer in layers])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_sequences_are_read_all_over_the_context(long_reader: Path, tmp_path: Path) -> None:
    """Two of 300 tokens in 1,000: the second as if 700 lay before it, which turns its keys."""
    text, output = text_of(tmp_path, 600), tmp_path / "made.safetensors"
    command = ["calibrate", "--model", str(long_reader), "--text", str(text), "-o", str(output)]
    assert main([*command, "--tokens", "300", "--sequences", "2", "--context-length", "1000"]) == 0
    model, tokenizer = load_model(long_reader)
    ids = sequences(tokenizer, text.read_text(), count=2, tokens=300, seed=0)
    with torch.inference_mode(), collecting.collecting(model) as moments:
        for sequence, first in zip(ids, (0, 700), strict=True):
            model(sequence[None], position_ids=torch.arange(first, first + 300)[None], use_cache=False)
    for made, expected in zip(calibration.load(output).layers, key_bases(moments), strict=True):
        torch.testing.assert_close(made.mean, expected.mean)
        torch.testing.assert_close(made.rotation, expected.rotation)


def test_without_a_text_the_shipped_one_is_read_and_several_are_read_together(
    long_reader: Path, tmp_path: Path
) -> None:
    output = tmp_path / "made.safetensors"
    base = ["calibrate", "--model", str(long_reader), "-o", str(output), "--tokens", "256", "--sequences", "2"]
    base += ["--context-length", "256"]
    assert main(base) == 0
    shipped = calibration.load(output)
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("abcd " * 400)
    other.write_text("wxyz " * 400)
    found = []
    for texts in ([one], [other], [one, other]):
        assert main([*base, "--text", *map(str, texts)]) == 0
        found.append(calibration.load(output).layers[0].mean)
    torch.testing.assert_close(found[2], (found[0] + found[1]) / 2, rtol=1e-3, atol=1e-3)
    assert not any(torch.allclose(mean, shipped.layers[0].mean) for mean in found)
