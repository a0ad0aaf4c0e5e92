"""What the tests of the Triton kernels share. They run in Triton's interpreter (TRITON_INTERPRET=1, set before Python
starts) or on a GPU; test_triton.py starts them in a process of their own, either way."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from importlib import import_module

import pytest
import torch

from deltastore_kernels import ops
from deltastore_kernels.ops import _triton

if _triton.interpreted():
    import tests.kernels.triton_interpreter  # noqa: F401  mends it

    DEVICE = "cpu"
elif torch.cuda.is_available():
    DEVICE = "cuda"
else:
    pytest.skip("neither TRITON_INTERPRET=1 nor a GPU; run tests/kernels/test_triton.py", allow_module_level=True)

TRITON = ops.load("triton", DEVICE)
ON_GPU = DEVICE == "cuda"


def on_device(value):
    """A tensor, or a dataclass with all its tensors, on the device under test."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if is_dataclass(value):
        return replace(value, **{field.name: on_device(getattr(value, field.name)) for field in fields(value)})
    return value


def module(operation: str):
    return import_module(f"deltastore_kernels.ops.{operation}.triton")


@pytest.fixture(params=[pytest.param(False, id="plain"), pytest.param(True, id="asm")])
def asm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways to unpack: Triton's own arithmetic, and NVIDIA's byte permutes (emulated in the interpreter)."""
    for operation in ("attend_decode", "attend_extend", "decode"):
        monkeypatch.setattr(module(operation), "use_asm", lambda _: request.param)
    return request.param
