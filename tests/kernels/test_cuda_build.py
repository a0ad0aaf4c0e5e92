"""Building and loading the CUDA modules: what of it runs without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deltastore_kernels import cuda_build
from deltastore_kernels.layout import Format, PageLayout
from deltastore_kernels.ops.attend_decode import triton
from sglang_deltastore.policy import kernels

K4V2 = cuda_build.Kernels(Format(4, 2), 128)


def test_a_changed_source_is_another_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("cuda", "include/deltastore"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "cuda" / "kernels.cuh").write_text("one")
    monkeypatch.setattr(cuda_build, "SOURCES", tmp_path)
    names = []
    for text in ("one", "two", "one"):
        (tmp_path / "cuda" / "kernels.cuh").write_text(text)
        cuda_build.source_hash.cache_clear()
        names.append(K4V2.name)
    cuda_build.source_hash.cache_clear()
    assert names[0] == names[2] != names[1]
    assert names[0].startswith("deltastore_k4v2_128_")


def test_a_folder_of_modules_without_the_right_one_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda_build.BUILT_MODULES, str(tmp_path))
    with pytest.raises(cuda_build.CudaUnavailable, match=f"no {K4V2.name}.so"):
        cuda_build.load.__wrapped__(K4V2)


def test_built_modules_need_no_flashinfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_build, "find_spec", lambda package: None if package == "flashinfer" else package)
    with pytest.raises(cuda_build.CudaUnavailable, match="need FlashInfer"):
        cuda_build.load.__wrapped__(K4V2)
    monkeypatch.setenv(cuda_build.BUILT_MODULES, str(tmp_path))
    with pytest.raises(cuda_build.CudaUnavailable, match=f"no {K4V2.name}.so"):
        cuda_build.load.__wrapped__(K4V2)


def test_a_toolkit_is_found_by_its_variable_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(cuda_build.CudaUnavailable, match="no bin/nvcc"):
        cuda_build.cuda_home()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    assert cuda_build.cuda_home() == tmp_path


def test_no_toolkit_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(cuda_build.Path, "exists", lambda path: False)
    with pytest.raises(cuda_build.CudaUnavailable, match="--kv-compress-kernels triton"):
        cuda_build.cuda_home()


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CUDA toolkit of nothing but an nvcc that fails; FlashInfer's cache is empty."""
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'nvcc of this test: no' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return tmp_path


def fails(error: Exception):
    def fail(*_arguments, **_keywords) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("No such file or directory: 'g++'"),
        subprocess.CalledProcessError(1, "g++", stderr="cc1plus: no"),
        RuntimeError("Ninja build failed"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("where", ["_link_folders", "gen_jit_spec"])
def test_whatever_fails_in_a_build_is_a_reason_to_take_other_kernels(
    where: str, error: Exception, toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "_link_folders":
        monkeypatch.setattr("flashinfer.jit.core.gen_jit_spec", lambda *_arguments, **_keywords: None)
        monkeypatch.setattr(cuda_build, "_link_folders", fails(error))
    else:
        monkeypatch.setattr("flashinfer.jit.core.gen_jit_spec", fails(error))
    with pytest.raises(cuda_build.CudaUnavailable, match="--kv-compress-kernels triton") as raised:
        cuda_build.build(K4V2)
    assert str(error) in str(raised.value)
    assert getattr(error, "stderr", "") in str(raised.value)


def test_no_host_compiler_is_no_crash(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For real, with nothing on PATH."""
    monkeypatch.setattr("flashinfer.jit.core.gen_jit_spec", lambda *_arguments, **_keywords: None)
    monkeypatch.setenv("PATH", str(toolkit / "bin"))
    with pytest.raises(cuda_build.CudaUnavailable, match=r"g\+\+"):
        cuda_build.build(K4V2)


def test_auto_takes_triton_then(toolkit: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr("flashinfer.jit.core.gen_jit_spec", lambda *_arguments, **_keywords: None)
    monkeypatch.setattr(cuda_build, "_link_folders", fails(FileNotFoundError("No such file: 'g++'")))
    monkeypatch.setattr(kernels, "_check_capability", lambda device: None)
    monkeypatch.delenv(cuda_build.BUILT_MODULES, raising=False)
    cuda_build.load.cache_clear()
    chosen = kernels.choose_kernels("auto", "cuda", [PageLayout(Format(4, 2), 2, 128, 16)])
    assert chosen.plan_decode is triton.DecodePlan
    assert "No such file: 'g++'" in caplog.text


def test_the_command_refuses_an_unknown_format(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cuda_build.main(["--arch", "9.0a", "--out", "nowhere", "--format", "K9V9"])
    assert "k9v9: known are K2V2" in capsys.readouterr().err


@pytest.mark.slow
def test_a_module_built_ahead_of_time_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer's JIT and binding for real; about twenty seconds of compiling."""
    try:
        cuda_build.cuda_home()
    except cuda_build.CudaUnavailable as error:
        pytest.skip(f"the CUDA kernels cannot be compiled here: {error}")
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path / "cache"))
    command = (sys.executable, "-m", "deltastore_kernels.cuda_build", "--arch", "8.0", "9.0a", "--out", str(tmp_path))
    subprocess.run((*command, "--format", "K4V2", "--head-dim", "128"), check=True)
    monkeypatch.setenv(cuda_build.BUILT_MODULES, str(tmp_path))
    module = cuda_build.load.__wrapped__(K4V2)
    assert callable(module.attend_decode)
    assert callable(module.decode_context)
