"""For which models SGLang's own pool frees what lies behind a window."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from sglang.srt.configs.model_config import ModelConfig

from sglang_deltastore.seam.deployment import stock_shares

WINDOWS = (128, None, 128, None)


@pytest.mark.parametrize(
    ("config", "architecture", "expected"),
    [
        ("GptOssConfig", "GptOssForCausalLM", (0.8, 1.0, 0.8, 1.0)),
        ("Gemma3TextConfig", "Gemma3ForCausalLM", (1.0, 1.0, 1.0, 1.0)),
        ("Olmo3Config", "Olmo3ForCausalLM", (1.0, 1.0, 1.0, 1.0)),
    ],
)
def test_of_each_layer(tmp_path: Path, config: str, architecture: str, expected: tuple[float, ...]) -> None:
    getattr(transformers, config)(num_hidden_layers=4, architectures=[architecture]).save_pretrained(tmp_path)
    model_config = ModelConfig(str(tmp_path))
    assert stock_shares(model_config, WINDOWS, 0.8) == expected
    assert stock_shares(model_config, (128, 128), 0.8) == (1.0, 1.0)
