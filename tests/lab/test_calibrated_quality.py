"""What a calibration brings real models: SmolLM2, and one whose keys have a huge bias."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sglang_deltastore.cli import main
from sglang_deltastore.lab.attention import ATTENTION
from sglang_deltastore.lab.candidates import Ours
from sglang_deltastore.lab.quality import measure, sequences
from sglang_deltastore.policy.calibration import load
from sglang_deltastore.policy.tiers import TIERS

pytestmark = pytest.mark.slow

DOCS = Path(__file__).resolve().parents[2] / "docs"
PACKED = [tier for tier in TIERS.values() if not tier.format.is_raw]
KEY_BIAS = 300.0
"""Of each KV head of each layer, its norm: as in the first and last layers of Qwen2.5."""


def losses(
    folder: Path, made: Path, protocol: str, tokens: int, first_position: int = 0, count: int = 1
) -> tuple[dict[str, float], ...]:
    """By tier, the mean KL without a calibration and with that of the file `made`, on the documents of this project."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=ATTENTION)
    text = "".join((DOCS / name).read_text() for name in ("laboratory.md", "serving.md", "observing.md"))
    token_ids = sequences(AutoTokenizer.from_pretrained(folder), text, count, tokens, seed=0)
    candidates = [Ours(tier.name, tier, calibration=found) for found in (None, load(made)) for tier in PACKED]
    rows = measure(model, token_ids, candidates, (protocol,), new_tokens=tokens // 4, first_position=first_position)
    found = [row["kl_mean"] for row in rows]
    names = [tier.name for tier in PACKED]
    return dict(zip(names, found[: len(names)], strict=True)), dict(zip(names, found[len(names) :], strict=True))


def test_behind_a_cached_prompt_the_default_calibration_loses_much_less(smollm2: Path, tmp_path: Path) -> None:
    """The last quarter of 2,048 tokens, where a context begins and as deep in it as the model reads."""
    assert main(["calibrate", "--model", str(smollm2), "-o", str(tmp_path / "made")]) == 0
    for first_position in (0, 8192 - 2048):
        without, calibrated = losses(smollm2, tmp_path / "made", "continue", 2048, first_position, count=2)
        for tier in PACKED:
            # Half where the bits stay as they are; a sixth where the keys give one to the values.
            share = 0.7 if tier.calibrated is None else 0.95
            assert calibrated[tier.name] < share * without[tier.name]


def with_key_bias(smollm2: Path, folder: Path) -> Path:
    """SmolLM2 whose keys have a bias, in the slowest pairs of RoPE: it is the same at all positions, nearly, so the
    softmax does not see it, as in a trained model."""
    plain = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    plain.config.attention_bias = True
    biased: PreTrainedModel = type(plain)(plain.config)
    biased.load_state_dict(plain.state_dict(), strict=False)
    half = biased.config.head_dim // 2
    for layer in biased.model.layers:
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            torch.nn.init.zeros_(projection.bias)
        by_head = attention.k_proj.bias.data.view(-1, 2 * half)
        by_head[:, [half - 2, half - 1, 2 * half - 2, 2 * half - 1]] = KEY_BIAS / 2
    biased.save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return folder


def test_calibration_repairs_keys_with_a_huge_bias(smollm2: Path, tmp_path: Path) -> None:
    """Without it all bits go to the bias; with it, keys are what they are without the bias."""
    folders = {"plain": smollm2, "biased": with_key_bias(smollm2, tmp_path / "biased")}
    found = {}
    for name, folder in folders.items():
        made = tmp_path / f"{name}.safetensors"
        sizes = ("--tokens", "512", "--sequences", "2")
        assert main(["calibrate", "--model", str(folder), "-o", str(made), *sizes]) == 0
        found[name] = losses(folder, made, "all", tokens=256)
    (_, plain), (broken, repaired) = found["plain"], found["biased"]
    for tier in PACKED:
        assert repaired[tier.name] < 1.5 * plain[tier.name]
        assert broken[tier.name] > 10 * repaired[tier.name]
