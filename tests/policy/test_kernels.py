"""What `--kv-compress-kernels` means on a GPU, as far as it can be told without one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from deltastore_kernels import cuda_build, ops
from deltastore_kernels.layout import Format, PageLayout
from sglang_deltastore.policy.kernels import choose_kernels

LAYOUTS = [PageLayout(Format(*bits), 2, 128, 16) for bits in ((4, 2), (4, 2), (3, 3))]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[cuda_build.Kernels]]:
    """gpu(capability, missing=...): a GPU that has this capability, and modules but for the missing one."""

    def pretend(capability: tuple[int, int], missing: Format | None = None) -> list[cuda_build.Kernels]:
        loaded = []

        def load(kernels: cuda_build.Kernels) -> None:
            if kernels.format == missing:
                raise cuda_build.CudaUnavailable("no CUDA compiler")
            loaded.append(kernels)

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(cuda_build, "load", load)
        return loaded

    return pretend


def is_backend(chosen: object, backend: str) -> bool:
    return vars(chosen) == vars(ops.load(backend, "cuda"))


def test_auto_takes_cuda_and_loads_every_module_once(gpu: Callable[..., list[cuda_build.Kernels]]) -> None:
    loaded = gpu((9, 0))
    assert is_backend(choose_kernels("auto", "cuda", LAYOUTS), "flashinfer")
    assert sorted(map(str, (kernels.format for kernels in loaded))) == ["K3V3", "K4V2"]


@pytest.mark.parametrize(("capability", "missing"), [((7, 5), None), ((9, 0), Format(3, 3))])
def test_auto_falls_back_to_triton_and_says_why(
    gpu: Callable[..., list[cuda_build.Kernels]],
    capability: tuple[int, int],
    missing: Format | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gpu(capability, missing)
    assert is_backend(choose_kernels("auto", "cuda", LAYOUTS), "triton")
    assert ("no CUDA compiler" if missing else "(7, 5)") in caplog.text
    with pytest.raises(cuda_build.CudaUnavailable):
        choose_kernels("flashinfer", "cuda", LAYOUTS)


def test_on_a_cpu_it_is_what_ops_load_says() -> None:
    assert vars(choose_kernels("reference", "cpu", LAYOUTS)) == vars(ops.load("reference"))
    with pytest.raises(ValueError, match="needs a GPU"):
        choose_kernels("flashinfer", "cpu", LAYOUTS)
