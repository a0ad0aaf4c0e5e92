"""For which models SGLang's own pool frees what lies behind a window."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from sglang.srt.configs.model_config import ModelConfig

from sglang_deltastore.seam.deployment import frees_windows


@pytest.mark.parametrize(
    ("config", "architecture", "frees"),
    [
        ("GptOssConfig", "GptOssForCausalLM", True),
        ("Gemma3TextConfig", "Gemma3ForCausalLM", False),
        ("Olmo3Config", "Olmo3ForCausalLM", False),
    ],
)
def test_sglang_s_own_list(tmp_path: Path, config: str, architecture: str, frees: bool) -> None:
    getattr(transformers, config)(architectures=[architecture]).save_pretrained(tmp_path)
    assert frees_windows(ModelConfig(str(tmp_path))) == frees
