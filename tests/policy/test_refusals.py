"""Every refusal: what was given, what is allowed, what to do."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from sglang_deltastore.policy import refusals
from sglang_deltastore.policy.refusals import Refused
from sglang_deltastore.policy.tiers import ADAPTIVE, TIERS
from sglang_deltastore.seam import flags

#: what SGLang's record holds when the user gave no option at all; the rest of it is in tests/e2e/test_options.py
NOTHING_GIVEN: dict[str, Any] = {
    "attention_backend": None,
    "page_size": None,
    "chunked_prefill_size": None,
    "kv_cache_dtype": "auto",
    "disaggregation_mode": "null",
    "enable_lmcache": False,
    "model_impl": "auto",
    "pp_size": 1,
    "dcp_size": 1,
    "lora_paths": None,
    "enable_hierarchical_cache": False,
    "hicache_storage_backend": None,
    "log_level": "info",
}
FILES = "file, together with --enable-hierarchical-cache and without adapters"


def check(**given: Any) -> None:
    refusals.check_options({**NOTHING_GIVEN, **given}, NOTHING_GIVEN)


def test_defaults_are_accepted() -> None:
    check()


@pytest.mark.parametrize("page_size", [16, 32, 48, 64, 128])
def test_page_sizes_of_whole_tiles_are_accepted(page_size: int) -> None:
    check(page_size=page_size, attention_backend="deltastore", kv_cache_dtype="bf16", chunked_prefill_size=page_size)


@pytest.mark.parametrize(
    "given",
    [
        {"chunked_prefill_size": -1}, {"chunked_prefill_size": 4096}, {"chunked_prefill_size": 48},
        {"log_level": "error"}, {"lora_paths": []}, {"lora_paths": ["a"]}, {"model_impl": "sglang"},
        {"enable_hierarchical_cache": True, "hicache_storage_backend": "file"},
    ],
)  # fmt: skip
def test_what_changes_nothing_is_accepted(given: dict[str, Any]) -> None:
    check(**given)


@pytest.mark.parametrize(
    ("given", "option", "allowed"),
    [
        ({"attention_backend": "torch_native"}, "--attention-backend torch_native", "unset or deltastore"),
        ({"page_size": 1}, "--page-size 1", "a multiple of 16"),
        ({"page_size": 24}, "--page-size 24", "a multiple of 16"),
        ({"page_size": 0}, "--page-size 0", "a multiple of 16"),
        ({"page_size": -16}, "--page-size -16", "a multiple of 16"),
        (
            {"chunked_prefill_size": 100}, "--chunked-prefill-size 100",
            "-1, or a multiple of --page-size (16 tokens unless given)",
        ),
        (
            {"page_size": 64, "chunked_prefill_size": 48}, "--chunked-prefill-size 48",
            "-1, or a multiple of --page-size (16 tokens unless given)",
        ),
        ({"kv_cache_dtype": "fp8_e4m3"}, "--kv-cache-dtype fp8_e4m3", "auto, bf16 or bfloat16"),
        ({"disaggregation_mode": "prefill"}, "--disaggregation-mode prefill", "null"),
        ({"enable_lmcache": True}, "--enable-lmcache True", "unset"),
        ({"model_impl": "mindspore"}, "--model-impl mindspore", "auto, sglang or transformers"),
        ({"pp_size": 2}, "--pipeline-parallel-size 2", "1"),
        ({"dcp_size": 2}, "--dcp-size 2", "1"),
        ({"hicache_storage_backend": "file"}, "--hicache-storage-backend file", FILES),
        (
            {"enable_hierarchical_cache": True, "hicache_storage_backend": "file", "lora_paths": ["a"]},
            "--hicache-storage-backend file", FILES,
        ),
        *(
            (
                {"enable_hierarchical_cache": True, "hicache_storage_backend": name},
                f"--hicache-storage-backend {name}", FILES,
            )
            for name in ("mooncake", "nixl", "hf3fs", "dynamic")
        ),
        ({"nobody_thought_of_it": 1}, "--nobody-thought-of-it 1", "unset"),
    ],
)  # fmt: skip
def test_options_are_refused(given: dict[str, Any], option: str, allowed: str) -> None:
    with pytest.raises(Refused) as refusal:
        check(**given)
    what, _, rest = str(refusal.value).partition(f"allowed is {allowed}, because ")
    assert what == f"--kv-compress deltastore with {option}: "
    why, _, advice = rest.rpartition("; ")
    assert why
    assert advice


@pytest.mark.parametrize(
    "given",
    [
        {"kv_compress_tier": "k4v2"}, {"kv_compress_tier": "lossless"}, {"kv_compress_calibration": "auto"},
        {"kv_compress_kernels": "cpu"}, {"kv_compress_show_prompts": True}, {"kv_compress_canary": 0.01},
        {"kv_compress": "none", "kv_compress_tier": "k4v2"},
    ],
)  # fmt: skip
def test_flags_without_the_switch_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="allowed is --kv-compress deltastore, because nothing is compressed without"):
        refusals.check_flags(given)
    refusals.check_flags({**given, "kv_compress": "deltastore"})


@pytest.mark.parametrize(
    ("beside", "named"),
    [
        ({"kv_compress_calibration": "none"}, "--kv-compress-calibration none"),
        ({"kv_compress_calibration": "a.safetensors"}, "--kv-compress-calibration a.safetensors"),
        ({"kv_compress_tier": "raw"}, "--kv-compress-tier raw"),
    ],
)
def test_a_text_that_nobody_would_read_is_refused(beside: dict[str, Any], named: str) -> None:
    given = {"kv_compress": "deltastore", "kv_compress_calibration_text": "text"}
    with pytest.raises(Refused, match=f"--kv-compress-calibration-text with {named}: allowed is"):
        refusals.check_flags({**given, **beside})
    refusals.check_flags({**given, "kv_compress_calibration": "auto", "kv_compress_tier": "k4v2"})


def test_a_patched_sglang_has_them_as_fields() -> None:
    fields = dict.fromkeys(("kv_compress_calibration", "kv_compress_kernels"))
    flags.check_fields(
        SimpleNamespace(kv_compress=None, kv_compress_tier=None, kv_compress_show_prompts=False, **fields)
    )
    flags.check_fields(SimpleNamespace(kv_compress="deltastore", kv_compress_tier="k4v2", **fields))
    flags.check_fields(SimpleNamespace(no="flags"))
    with pytest.raises(Refused, match="--kv-compress-tier k4v2 with --kv-compress unset"):
        flags.check_fields(SimpleNamespace(kv_compress=None, kv_compress_tier="k4v2", **fields))


def test_no_flags_are_accepted() -> None:
    refusals.check_flags({})
    refusals.check_flags({"kv_compress": "none"})


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ((0.5, 2, None), "--kv-compress-canary 0.5 with --tensor-parallel-size 2: allowed is one rank, because"),
        ((1.0, 1, "NGRAM"), "--kv-compress-canary 1 with --speculative-algorithm NGRAM: allowed is one token a step"),
    ],
)
def test_requests_that_could_not_be_run_again_are_refused(given: tuple[float, int, str | None], named: str) -> None:
    with pytest.raises(Refused, match=named):
        refusals.check_canary(*given)
    refusals.check_canary(0, *given[1:])
    refusals.check_canary(given[0], 1, None)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (
            ("cuda", "auto", False, False),
            "--device cuda: allowed is a CPU, because kernels for GPUs .* add --device cpu, or",
        ),
        (("cpu", "triton", False, False), "--kv-compress-kernels triton: allowed is a CPU"),
        (("cpu", "auto", True, False), "--enable-hierarchical-cache: allowed is one memory"),
        (("cpu", "cpu", False, True), "this model: allowed is one pool for all layers"),
    ],
)
def test_levels_where_pages_could_not_be_read_or_moved_are_refused(given: Any, named: str) -> None:
    with pytest.raises(Refused, match=f"--kv-compress-tier adaptive with {named}"):
        refusals.check_levels(ADAPTIVE, *given)
    refusals.check_levels(TIERS["lossless"], *given)
    refusals.check_levels(ADAPTIVE, "cpu", "auto", host_memory=False, has_window_pool=False)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("STANDALONE", None, None, None, False), "STANDALONE without --speculative-draft-model-path: allowed is one"),
        (
            ("NGRAM", "m", None, None, False),
            "--speculative-draft-model-path with --speculative-algorithm NGRAM: allowed",
        ),
        ((None, "m", None, None, False), "--speculative-draft-model-path with --speculative-algorithm unset: allowed"),
        (("STANDALONE", "m", 3, 5, False), "draft-tokens 5 with --speculative-num-steps 3: allowed is 4, because"),
        (("STANDALONE", "m", None, None, True), "--enable-hierarchical-cache with --speculative-algorithm STANDALONE"),
    ],
)
def test_draft_models_that_cannot_be_had_are_refused(given: tuple[Any, ...], named: str) -> None:
    with pytest.raises(Refused, match=named):
        refusals.check_drafts(*given)


def test_drafts_that_can_be_had_are_accepted() -> None:
    for steps, drafts in ((None, None), (3, None), (None, 4), (3, 4)):
        refusals.check_drafts("STANDALONE", "m", steps, drafts, host_memory=False)
    refusals.check_drafts("NGRAM", None, None, 8, host_memory=True)
    refusals.check_drafts(None, None, None, None, host_memory=True)


@pytest.mark.parametrize(
    ("draft", "model", "named"),
    [
        ({"attention_arch": SimpleNamespace(name="MLA")}, {}, "its attention architecture is MLA; allowed is MHA"),
        ({"hf_text_config": SimpleNamespace(mamba_d_state=16)}, {}, "it has mamba_d_state; allowed is attention in"),
        (
            {"hf_config": SimpleNamespace(architectures=["Gemma4AssistantForCausalLM"])},
            {},
            "it reads the model's own KV, as floats; allowed is a draft model that keeps its own",
        ),
        ({"vocab_size": 5}, {}, "its vocabulary has 5 tokens; allowed is 4096, as the model's; draft with another"),
        ({"is_hybrid_swa": True}, {}, "the draft model frees what lies behind its windows; allowed is one pool"),
        ({}, {"is_hybrid_swa": True}, "the model frees what lies behind its windows; allowed is one pool"),
    ],
)
def test_draft_models_that_are_not_proven_are_refused(draft: dict[str, Any], model: dict[str, Any], named: str) -> None:
    refusals.check_draft_model(model_config(), model_config())
    with pytest.raises(Refused, match=r"--speculative-draft-model-path with \w+ForCausalLM: " + named):
        refusals.check_draft_model(model_config(**draft), model_config(**model))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2", "2.0: allowed is the share of requests"),
        ("half", "half: allowed is a number from 0 to 1"),
        ("nan", "nan: "),
    ],
)
def test_a_command_line_says_what_a_share_is(text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    flags.add_cli_args(None, parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--kv-compress-canary", text])
    assert said in capsys.readouterr().err
    args = parser.parse_args(["--kv-compress", "deltastore", "--kv-compress-canary", "0.01"])
    assert flags.flags_of(args) == {"kv_compress": "deltastore", "kv_compress_canary": 0.01}


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "version", lambda _: "0.5.24")
    with pytest.raises(
        Refused, match=r"SGLang 0\.5\.24 is installed; tested are 0\.5\.23; run: pip install sglang==0\.5\.23"
    ):
        refusals.check_version()


def test_another_device_is_refused() -> None:
    refusals.check_device("cpu")
    refusals.check_device("cuda")
    with pytest.raises(Refused, match=r"--device xpu: allowed is cpu, cuda; .*add --device cpu"):
        refusals.check_device("xpu")


def model_config(**given: Any) -> SimpleNamespace:
    facts = {
        "hf_config": SimpleNamespace(architectures=["SomeForCausalLM"]),
        "attention_arch": SimpleNamespace(name="MHA"),
        "is_hybrid_swa": False,
        "vocab_size": 4096,
        "is_encoder_decoder": False,
        "is_generation": True,
        "head_dim": 64,
        "v_head_dim": 64,
        "is_multimodal": False,
    }
    return SimpleNamespace(**{**facts, **given})


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 192, 256, 512])
def test_models_are_accepted(head_dim: int) -> None:
    refusals.check_model(model_config(head_dim=head_dim, v_head_dim=head_dim))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"attention_arch": SimpleNamespace(name="MLA")}, "the attention architecture is MLA; allowed is MHA"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is True; allowed is a decoder-only model"),
        ({"is_generation": False}, "is_generation is False"),
        ({"head_dim": 576, "v_head_dim": 512}, "head_dim is 576; allowed is at most 512"),
        ({"v_head_dim": 544}, "v_head_dim is 544; allowed is at most 512"),
    ],
)
def test_models_are_refused(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(Refused) as refusal:
        refusals.check_model(model_config(**given))
    assert complaint in str(refusal.value)
    assert "SomeForCausalLM" in str(refusal.value)
    assert "serve this model with --kv-compress none" in str(refusal.value)


def test_images_cannot_be_shown_as_prompts() -> None:
    refusals.check_model(model_config(), show_prompts=True)
    refusals.check_model(model_config(is_multimodal=True))
    with pytest.raises(Refused, match="--kv-compress-show-prompts with SomeForCausalLM: allowed is a model of text"):
        refusals.check_model(model_config(is_multimodal=True), show_prompts=True)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"layer_types": ["linear_attention", "full_attention"]}, "layer_types with linear_attention"),
        ({"layer_types": ["full_attention", "conv"]}, "layer_types with conv"),
        ({"layer_types": ["chunked_attention"]}, "layer_types with chunked_attention"),
        ({"mamba_d_state": 128}, "mamba_d_state"),
        ({"ssm_state_size": 128, "layer_types": None}, "ssm_state_size"),
    ],
)
def test_hybrid_models_are_refused_by_their_configuration(fields: dict[str, Any], found: str) -> None:
    refusals.check_model(model_config(hf_text_config=SimpleNamespace(layer_types=["full_attention"] * 3)))
    with pytest.raises(Refused, match=f"SomeForCausalLM: a kind of layer is {found}; allowed is attention in every"):
        refusals.check_model(model_config(hf_text_config=SimpleNamespace(**fields)))


def test_a_hybrid_s_configuration_without_its_other_layers_is_none() -> None:
    """As Granite 4 Micro: all layers are attention."""
    config = SimpleNamespace(layer_types=["attention"] * 3, mamba_d_state=128, model_type="granitemoehybrid")
    refusals.check_model(model_config(hf_text_config=config), keeps_states=False)


@pytest.mark.parametrize("model_type", refusals.SERVED_HYBRIDS)
def test_proven_hybrids_are_served_where_sglang_keeps_their_states(model_type: str) -> None:
    config = SimpleNamespace(layer_types=["linear_attention", "full_attention"], model_type=model_type)
    refusals.check_model(model_config(hf_text_config=config))
    with pytest.raises(
        Refused, match="a hybrid's platform is one where SGLang keeps no states for whole pages; allowed"
    ):
        refusals.check_model(model_config(hf_text_config=config), keeps_states=False)
    with pytest.raises(
        Refused, match="--enable-hierarchical-cache with SomeForCausalLM: allowed is a model whose layers are all"
    ):
        refusals.check_model(model_config(hf_text_config=config), host_memory=True)
    with pytest.raises(
        Refused, match="--speculative-algorithm with SomeForCausalLM: allowed is a model whose layers are all"
    ):
        refusals.check_model(model_config(hf_text_config=config), speculates=True)


def test_windows_that_free_pages_want_host_memory_off_and_a_layer_without() -> None:
    windows = {"is_hybrid_swa": True, "full_attention_layer_ids": [1]}
    refusals.check_model(model_config(**windows))
    for given, host_memory in ((windows, True), ({**windows, "full_attention_layer_ids": []}, False)):
        with pytest.raises(Refused, match=r"allowed is one pool for all layers, .*; add --disable-hybrid-swa-memory"):
            refusals.check_model(model_config(**given), host_memory=host_memory)


def test_models_of_attention_alone_may_keep_pages_in_host_memory() -> None:
    refusals.check_model(model_config(), host_memory=True)


@pytest.mark.parametrize("name", ["LlamaConfig", "Qwen3MoeConfig", "Gemma3TextConfig", "MixtralConfig"])
def test_configurations_of_attention_alone_are_accepted(name: str) -> None:
    assert refusals.state_layers(getattr(transformers, name)()) is None


@pytest.mark.parametrize("name", ["FalconH1Config", "Qwen3NextConfig", "NemotronHConfig", "Llama4TextConfig"])
def test_configurations_of_hybrids_are_known(name: str) -> None:
    assert refusals.state_layers(getattr(transformers, name)()).startswith("layer_types with ")
