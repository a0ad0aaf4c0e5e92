"""What the tests share: a CPU-only machine can import SGLang, and the embedded model is at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sglang_deltastore.host import activate, model_path

activate()  # before any test imports sglang

#: Servers and browsers share the machine here, and GNU OpenMP's threads would spin for cores that others have.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU here: run make test-gpu on a machine with one"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the embedded SmolLM2-135M-Instruct."""
    return model_path("smollm2")
