"""Every refusal: what was given, what is allowed, what to do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_deltastore import refusals
from sglang_deltastore.refusals import Refused

#: what SGLang's record holds when the user gave no option at all
NOTHING_GIVEN = {refusals.record_field(rule): None for rule in refusals.OPTION_RULES} | {
    "kv_cache_dtype": "auto",
    "disaggregation_mode": "null",
    "pp_size": 1,
    "dp_size": 1,
}


def options(**given: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**NOTHING_GIVEN, **given})


def test_defaults_are_accepted() -> None:
    refusals.check_options(options())


@pytest.mark.parametrize("page_size", [16, 32, 48, 64, 128])
def test_page_sizes_of_whole_tiles_are_accepted(page_size: int) -> None:
    refusals.check_options(options(page_size=page_size, attention_backend="deltastore", kv_cache_dtype="bf16"))


@pytest.mark.parametrize(
    ("given", "option", "allowed"),
    [
        ({"attention_backend": "torch_native"}, "--attention-backend torch_native", "unset or deltastore"),
        ({"prefill_attention_backend": "fa3"}, "--prefill-attention-backend fa3", "unset or deltastore"),
        ({"decode_attention_backend": "triton"}, "--decode-attention-backend triton", "unset or deltastore"),
        ({"radix_cache_backend": "flexkv"}, "--radix-cache-backend flexkv", "unset or deltastore"),
        ({"page_size": 1}, "--page-size 1", "a multiple of 16"),
        ({"page_size": 24}, "--page-size 24", "a multiple of 16"),
        ({"page_size": 0}, "--page-size 0", "a multiple of 16"),
        ({"page_size": -16}, "--page-size -16", "a multiple of 16"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "--kv-cache-dtype fp8_e4m3", "auto, bf16 or bfloat16"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype fp8_e5m2", "auto, bf16 or bfloat16"),
        ({"kv_cache_dtype": "nvfp4"}, "--kv-cache-dtype nvfp4", "auto, bf16 or bfloat16"),
        ({"kv_cache_dtype": "fp4_mx_block16"}, "--kv-cache-dtype fp4_mx_block16", "auto, bf16 or bfloat16"),
        ({"kv_cache_dtype": "mxfp8"}, "--kv-cache-dtype mxfp8", "auto, bf16 or bfloat16"),
        ({"speculative_algorithm": "EAGLE"}, "--speculative-algorithm EAGLE", "unset"),
        ({"disaggregation_mode": "prefill"}, "--disaggregation-mode prefill", "null"),
        ({"disaggregation_mode": "decode"}, "--disaggregation-mode decode", "null"),
        ({"enable_hierarchical_cache": True}, "--enable-hierarchical-cache True", "unset"),
        ({"enable_lmcache": True}, "--enable-lmcache True", "unset"),
        ({"enable_streaming_session": True}, "--enable-streaming-session True", "unset"),
        ({"dllm_algorithm": "x"}, "--dllm-algorithm x", "unset"),
        ({"pp_size": 2}, "--pipeline-parallel-size 2", "1"),
        ({"dp_size": 2}, "--data-parallel-size 2", "1"),
    ],
)
def test_options_are_refused(given: dict[str, Any], option: str, allowed: str) -> None:
    with pytest.raises(Refused) as refusal:
        refusals.check_options(options(**given))
    what, _, advice = str(refusal.value).partition(f"allowed is {allowed}; ")
    assert what == f"--kv-compress deltastore with {option}: "
    assert advice


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
        "is_encoder_decoder": False,
        "is_generation": True,
        "head_dim": 64,
        "v_head_dim": 64,
    }
    return SimpleNamespace(**{**facts, **given})


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_models_are_accepted(head_dim: int) -> None:
    refusals.check_model(model_config(head_dim=head_dim, v_head_dim=head_dim))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"attention_arch": SimpleNamespace(name="MLA")}, "the attention architecture is MLA; allowed is MHA"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is True; allowed is a decoder-only model"),
        ({"is_generation": False}, "is_generation is False"),
        ({"head_dim": 80, "v_head_dim": 80}, "head_dim is 80; allowed is one of"),
        ({"head_dim": 96, "v_head_dim": 96}, "head_dim is 96; allowed is one of"),
        ({"v_head_dim": 128}, "v_head_dim is 128; allowed is head_dim, 64"),
    ],
)
def test_models_are_refused(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(Refused) as refusal:
        refusals.check_model(model_config(**given))
    assert complaint in str(refusal.value)
    assert "SomeForCausalLM" in str(refusal.value)
    assert "serve this model with --kv-compress none" in str(refusal.value)
