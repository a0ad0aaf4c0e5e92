"""Refusals where users meet them: in SGLang's own resolution, before anything heavy is started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_deltastore.policy.refusals import Refused
from tests.e2e import draft_heads, random_models

pytestmark = pytest.mark.slow


def resolve(model: Path, **options: Any) -> Any:
    """What `--kv-compress deltastore` with these options resolves to."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.entrypoints.engine import Engine

    server_args = Engine.server_args_class(
        model_path=str(model), kv_compress="deltastore", **{"device": "cpu", **options}
    )
    server_args.resolve_once()
    return server_args


def model_folder(tmp_path: Path, smollm2: Path, **changes: Any) -> Path:
    """SmolLM2's folder with another configuration; weights are not needed to be refused."""
    config = json.loads((smollm2 / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(smollm2 / name)
    return tmp_path


def test_what_it_resolves_to(smollm2: Path) -> None:
    from sglang.srt.arg_groups.overrides import resolving_view

    view = resolving_view(resolve(smollm2))
    assert view.attention_backend == view.radix_cache_backend == "deltastore"
    assert view.page_size == 16
    assert resolving_view(resolve(smollm2, page_size=64)).page_size == 64


@pytest.mark.parametrize(("device", "attention"), [("cpu", "intel_amx"), ("cuda", "triton")])
def test_drafts_of_a_head_for_a_llama_are_a_chain(smollm2: Path, tmp_path: Path, device: str, attention: str) -> None:
    """For which SGLang itself would choose a tree."""
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.arg_groups.speculative_hook import _auto_choose_speculative_params

    head = {"speculative_algorithm": "EAGLE", "speculative_draft_model_path": str(draft_heads.echo(smollm2, tmp_path))}
    server_args = resolve(smollm2, device=device, **head)
    assert _auto_choose_speculative_params(server_args, "LlamaForCausalLM")[1] > 1
    view = resolving_view(server_args)
    chain = view.speculative_num_steps, view.speculative_eagle_topk, view.speculative_num_draft_tokens
    assert (*chain, view.speculative_draft_attention_backend) == (3, 1, 4, attention)
    view = resolving_view(resolve(smollm2, device=device, speculative_num_draft_tokens=8, **head))
    assert (view.speculative_num_steps, view.speculative_num_draft_tokens) == (7, 8)


def test_a_draft_model_of_another_vocabulary_is_refused(smollm2: Path, tmp_path: Path) -> None:
    other = model_folder(tmp_path, smollm2, vocab_size=1000)
    with pytest.raises(Refused, match="its vocabulary has 1000 tokens; allowed is 49152, as the model's"):
        resolve(smollm2, speculative_algorithm="STANDALONE", speculative_draft_model_path=str(other))


def test_on_a_gpu_decode_steps_are_graphs_and_extends_are_not(smollm2: Path) -> None:
    from sglang.srt.arg_groups.overrides import post_capture_kv_sizing_planned, resolving_view

    server_args = resolve(smollm2, device="cuda")
    view = resolving_view(server_args)
    assert view.attention_backend == "deltastore"
    assert (view.cuda_graph_config.decode.backend, view.cuda_graph_config.prefill.backend) == ("full", "disabled")
    assert not post_capture_kv_sizing_planned(server_args), "the pool would be sized after the capture"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_models_that_sglang_allows_few_backends_are_allowed_ours(device: str, tmp_path: Path, smollm2: Path) -> None:
    """gpt-oss asserts the backend's name."""
    from sglang.srt.arg_groups.overrides import resolving_view

    config = random_models.gpt_oss().to_dict() | {"architectures": ["GptOssForCausalLM"]}
    folder = model_folder(tmp_path, smollm2, **config)
    assert resolving_view(resolve(folder, device=device)).attention_backend == "deltastore"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"page_size": 24}, "--page-size 24: allowed is a multiple of 16"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype fp8_e5m2: allowed is auto, bf16 or bfloat16"),
        ({"attention_backend": "torch_native"}, "--attention-backend torch_native: allowed is unset or deltastore"),
        ({"speculative_algorithm": "DFLASH"}, "--speculative-algorithm DFLASH: allowed is NGRAM, STANDALONE, EAGLE, "),
        ({"speculative_algorithm": "STANDALONE"}, "STANDALONE without --speculative-draft-model-path: allowed is one"),
        (
            {"speculative_algorithm": "STANDALONE", "speculative_draft_model_path": "m", "speculative_num_steps": 16},
            "--speculative-num-steps 16: allowed is 1 .. 15",
        ),
        (
            {"speculative_algorithm": "STANDALONE", "speculative_draft_model_path": "m", "speculative_eagle_topk": 4},
            "--speculative-eagle-topk 4: allowed is unset or 1",
        ),
        (
            {"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 17},
            "--speculative-num-draft-tokens 17: allowed is 2 .. 16",
        ),
        (
            {"speculative_algorithm": "NGRAM", "speculative_ngram_max_bfs_breadth": 4},
            "--speculative-ngram-max-bfs-breadth 4: allowed is 10 or 1",
        ),
        ({"disaggregation_mode": "prefill"}, "--disaggregation-mode prefill: allowed is null"),
        ({"enable_lmcache": True}, "--enable-lmcache True: allowed is unset"),
        ({"device": "xpu"}, "--device xpu: allowed is cpu, cuda"),
    ],
)
def test_options_are_refused_in_the_launcher(smollm2: Path, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(Refused) as refusal:
        resolve(smollm2, **options)
    assert complaint in str(refusal.value)


def test_workers_with_a_foreign_app_are_refused_in_the_launcher(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_HTTP_SERVER_APP_PATH", "somebody.elses:app")
    resolve(smollm2)  # the launcher itself answers
    with pytest.raises(Refused, match=r"SGLANG_HTTP_SERVER_APP_PATH and --tokenizer-worker-num 2: allowed is one"):
        resolve(smollm2, tokenizer_worker_num=2)
    monkeypatch.setenv("SGLANG_HTTP_SERVER_APP_PATH", "sglang_deltastore.seam.http_worker:app")
    resolve(smollm2, tokenizer_worker_num=2)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"head_dim": 544}, "head_dim is 544; allowed is at most 512"),
        (
            {
                "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "kv_lora_rank": 512,
                "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "q_lora_rank": None,
                "n_routed_experts": 4, "first_k_dense_replace": 0, "moe_intermediate_size": 64,
            },
            "the attention architecture is MLA; allowed is MHA, MQA or GQA",
        ),
    ],
)  # fmt: skip
def test_models_are_refused_in_the_launcher(
    tmp_path: Path, smollm2: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(Refused) as refusal:
        resolve(model_folder(tmp_path, smollm2, **changes))
    assert complaint in str(refusal.value)


def test_the_command_line_says_which_tiers_there_are(smollm2: Path) -> None:
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(smollm2), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--kv-compress", "deltastore", "--kv-compress-tier", "k9v9"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "invalid choice: 'k9v9'" in done.stderr
    assert "'raw', 'lossless', 'k4v2', 'conservative'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--kv-compress", "deltastore", "--chunked-prefill-size", "100"],
            "--kv-compress deltastore with --chunked-prefill-size 100: allowed is -1, or a multiple of --page-size (16 "
            "tokens unless given), because pages are of 16 tokens unless --page-size says otherwise, and a chunk of a "
            "prompt holds whole pages; take a multiple, or -1 for no chunks",
        ),
        (
            ["--kv-compress-tier", "lossless"],
            "--kv-compress-tier lossless with --kv-compress unset: allowed is --kv-compress deltastore, because "
            "nothing is compressed without; add --kv-compress deltastore, or drop --kv-compress-tier",
        ),
        (
            ["--config", "options.yaml"],
            "--kv-compress-kernels cpu with --kv-compress unset: allowed is --kv-compress deltastore, because nothing "
            "is compressed without; add --kv-compress deltastore, or drop --kv-compress-kernels",
        ),
        (
            ["--kv-compress", "deltastore", "--kv-compress-calibration", "missing.safetensors"],
            "missing.safetensors: cannot be read",
        ),
    ],
)  # fmt: skip
def test_a_refusal_on_the_command_line_is_one_sentence(
    arguments: list[str], sentence: str, smollm2: Path, tmp_path: Path
) -> None:
    (tmp_path / "options.yaml").write_text("kv-compress-kernels: cpu\n")
    command = [sys.executable, "-W", "ignore", "-m", "sglang.launch_server", "--model-path", str(smollm2)]
    done = subprocess.run(
        [*command, "--device", "cpu", *arguments],
        capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 78, done.stderr[-2000:]
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said.startswith(f"error: {sentence}")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("flags", [{"kv_compress_tier": "k4v2"}, {"kv_compress": "none", "kv_compress_tier": "k4v2"}])
def test_a_flag_of_the_engine_without_the_switch_is_refused(smollm2: Path, flags: dict[str, str]) -> None:
    resolve(smollm2)  # loads the plugin
    from sglang.srt.entrypoints.engine import Engine

    with pytest.raises(Refused, match=r"--kv-compress-tier k4v2 with --kv-compress (unset|none): allowed is"):
        Engine.server_args_class(model_path=str(smollm2), **flags)


def test_a_server_in_rust_is_refused(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    with pytest.raises(Refused, match="SGLANG_RUST_SERVER=1: allowed is unset, because requests would come past"):
        resolve(smollm2)


def test_doctor_knows_a_model_that_is_refused(tmp_path: Path, smollm2: Path) -> None:
    from sglang_deltastore import cli

    assert cli.main(["doctor", "--model", str(smollm2)]) == 0
    assert cli.main(["doctor", "--model", str(model_folder(tmp_path, smollm2, head_dim=544))]) == 1
