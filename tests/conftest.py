"""What the tests share: a CPU-only machine can import SGLang, and the embedded model is at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_deltastore.cpu_host import activate, model_path

activate()  # before any test imports sglang


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the embedded SmolLM2-135M-Instruct."""
    return model_path("smollm2")
