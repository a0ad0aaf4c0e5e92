"""Every operation has a twin, and every backend of it the twin's signature."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from deltastore_kernels import native, ops

FOLDER = Path(ops.__file__).parent
MODULES = sorted(path for path in FOLDER.glob("*/*.py") if path.stem != "__init__")


FOLDERS = dict(ops.OPERATIONS.values())


def operation_of(path: Path) -> Any:
    """The function, or the plan's class, that a backend's module offers."""
    return getattr(import_module(f"deltastore_kernels.ops.{path.parent.name}.{path.stem}"), FOLDERS[path.parent.name])


def test_the_folders_are_the_operations() -> None:
    assert {path.parent.name for path in FOLDER.glob("*/__init__.py")} == set(FOLDERS)
    assert {path.parent.name for path in MODULES if path.stem == "reference"} == set(FOLDERS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_a_backend_has_its_twins_signature(path: Path) -> None:
    ours, twin = operation_of(path), operation_of(path.with_name("reference.py"))
    assert inspect.signature(ours) == inspect.signature(twin)
    if inspect.isclass(twin):
        assert inspect.signature(ours.run) == inspect.signature(twin.run)


@pytest.mark.parametrize("operation", ops.OPERATIONS)
def test_the_protocol_says_the_reference_s_signature(operation: str) -> None:
    folder, name = ops.OPERATIONS[operation]
    said = inspect.signature(getattr(ops.Operations, operation))
    twin = getattr(import_module(f"deltastore_kernels.ops.{folder}.reference"), name)
    assert list(said.parameters.values())[1:] == list(inspect.signature(twin).parameters.values())
    if inspect.isclass(twin):
        assert inspect.signature(getattr(ops, name).run) == inspect.signature(twin.run)


@pytest.mark.parametrize("backend", ("auto", *ops.BACKENDS))
def test_load_gives_every_operation(backend: str) -> None:
    if backend == "cpu" and not native.available():
        pytest.skip("the compiled CPU kernels are not here")
    loaded = ops.load(backend, "cuda" if backend in ops.GPU_BACKENDS else "cpu")
    assert all(callable(getattr(loaded, name)) for name in ops.OPERATIONS)
    assert loaded.shares_reads == (backend == "triton")


@pytest.mark.parametrize("backend", ops.GPU_BACKENDS)
def test_a_gpu_s_kernels_are_refused_on_a_cpu(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"'{backend}' on a CPU: it needs a GPU"):
        ops.load(backend, "cpu")


def test_load_refuses_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match="'rocm'") as refusal:
        ops.load("rocm")
    assert all(backend in str(refusal.value) for backend in ops.BACKENDS)
