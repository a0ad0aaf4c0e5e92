"""Models read from config.json, against bytes worked by hand and sizes that their makers publish."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_deltastore.fleet.configs import model_from_config
from sglang_deltastore.fleet.kv import FP16
from sglang_deltastore.fleet.tables import Model, read_table

CONFIGS = Path(__file__).parent / "configs"
"""Shapes of published models, written out anew."""
MODELS = read_table(Model, "models.toml")
LLAMA = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "model_type": "llama",
}


def read(folder: Path, config: Any) -> Model:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return model_from_config(folder)


def published(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def test_shape_and_parameters(tmp_path: Path) -> None:
    model = read(tmp_path, LLAMA)
    assert (model.layers, model.kv_heads, model.head_dim, model.parameters) == (32, 8, 128, 8_030_261_248)
    assert (model.weight_bytes_per_parameter, model.state_bytes) == (2, 0)
    qwen = {**LLAMA, "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
            "intermediate_size": 29568, "vocab_size": 152064, "model_type": "qwen2"}  # fmt: skip
    assert read(tmp_path, qwen).parameters == MODELS["Qwen2-72B"].parameters
    assert model_from_config(tmp_path / "config.json").parameters == MODELS["Qwen2-72B"].parameters
    tied = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
            "intermediate_size": 1536, "vocab_size": 49152, "model_type": "llama",
            "tie_word_embeddings": True}  # fmt: skip
    assert read(tmp_path, tied).parameters == MODELS["SmolLM2-135M"].parameters


@pytest.mark.parametrize(
    ("name", "kv_bytes", "weights_gb", "state_bytes"),
    [
        # 2 (K, V) x layers that keep KV x KV heads x head_dim x 2 bytes; weights by the checkpoints' sizes
        ("Phi-4", 2 * 40 * 10 * 128 * 2, 29.3, 0),
        ("Gemma-2-9B", 2 * 42 * 8 * 256 * 2, 18.5, 0),
        ("Mistral-Small-3.1-24B", 2 * 40 * 8 * 128 * 2, 48.0, 0),
        ("Qwen3-32B-AWQ", 2 * 64 * 8 * 128 * 2, 19.3, 0),
        ("Llama-3.1-405B-FP8", 2 * 126 * 8 * 128 * 2, 410.0, 0),
        ("gpt-oss-120b", 2 * 36 * 8 * 64 * 2, 65.3, 0),
        # ten convolutions over three tokens keep two: 10 x 2048 x 2 x 2 bytes
        ("LFM2-1.2B", 2 * 6 * 8 * 64 * 2, 2.34, 10 * 2048 * 2 * 2),
        # 24 x (128 heads x 64 x 128 in float32, and 3 inputs of 8192 + 2 x 8 x 128 channels in 16 bits)
        ("Nemotron-H-8B", 2 * 4 * 8 * 128 * 2, 16.2, 24 * (128 * 64 * 128 * 4 + 3 * (8192 + 2048) * 2)),
        # 36 x (32 heads x 128 x 128 in float32, and 3 inputs of 4096 + 2 x 16 x 128 channels in 16 bits)
        ("Qwen3-Next-80B-A3B", 2 * 12 * 2 * 256 * 2, 159.3, 36 * (32 * 128 * 128 * 4 + 3 * (4096 + 4096) * 2)),
    ],
)
def test_published_models(tmp_path: Path, name: str, kv_bytes: int, weights_gb: float, state_bytes: int) -> None:
    model = read(tmp_path / name, published(name))
    assert model.name == name
    assert FP16.bytes_per_token(model) == kv_bytes
    assert model.weights_bytes / 1e9 == pytest.approx(weights_gb, rel=0.01)
    assert model.state_bytes == state_bytes
    assert ("what-if" in model.source) == bool(state_bytes)


@pytest.mark.parametrize(
    ("quantization", "linear_bits"),
    [
        (None, 16),
        ({}, 16),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4 + 20 / 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4.5),
        ({"quant_method": "compressed-tensors",
          "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 128}}}}, 4.125),
    ],
)  # fmt: skip
def test_quantized_weights(tmp_path: Path, quantization: dict[str, Any] | None, linear_bits: float) -> None:
    model = read(tmp_path, {**LLAMA, "quantization_config": quantization})
    norms = 65 * 4096
    embeddings = 2 * 128_256 * 4096
    linear = model.parameters - norms - embeddings
    assert model.weights_bytes == pytest.approx((linear * linear_bits + (norms + embeddings) * 16) / 8)


def test_what_a_quantization_leaves_out_stays_in_16_bits(tmp_path: Path) -> None:
    """By name, by part of a name, by pattern; attention is 32 x 2 x 4096 x 128 x (32 + 8) parameters."""
    fp8 = {"quant_method": "fp8"}
    whole = read(tmp_path, {**LLAMA, "quantization_config": fp8}).weights_bytes
    attention = 32 * 2 * 4096 * 128 * (32 + 8)
    for field, entries in (
        ("modules_to_not_convert", ["self_attn"]),
        ("ignore", ["re:.*self_attn.*", "lm_head"]),
        ("ignored_layers", [f"model.layers.{layer}.self_attn" for layer in range(32)]),
        ("exclude_modules", ["model.layers.*.self_attn"]),
    ):
        found = read(tmp_path, {**LLAMA, "quantization_config": {**fp8, field: entries}}).weights_bytes
        assert found - whole == attention, field


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"hidden_size": "big"}, "cannot read it"),
        ({"intermediate_size": None}, "transformers"),
        ({"num_key_value_heads": [8] * 32}, "transformers|num_key_value_heads"),
        ({"model_type": None}, "model_type is None, which transformers"),
        ({"model_type": "nemotron-nas"}, "model_type is 'nemotron-nas', which transformers"),
        ({"model_type": ["llama"]}, "model_type is"),
        ({"model_type": "deepseek_v3"}, r"kv_lora_rank is 512: latents"),
        ({"model_type": "t5", "d_model": 512, "num_layers": 6}, "is_encoder_decoder"),
        ({"model_type": "gemma3n_text", "num_key_value_heads": 2}, "share one KV cache|transformers"),
        ({"model_type": "falcon_h1"}, "layers of kind 'hybrid': known are full_attention"),
        ({"model_type": "mamba2"}, "0 layers with keys and values|transformers builds 0"),
        ({"model_type": "jamba"}, "the state of its linear_attention layers is not understood"),
        ({"model_type": "falcon", "multi_query": True, "num_key_value_heads": None}, "multi_query"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "quant_method 'aqlm': known are awq"),
        ({"quantization_config": {"quant_method": "awq", "bits": "4"}}, "has '4' bits"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 0}}, "group_size 0"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "X"}}, "quant_algo 'X'"),
        ({"quantization_config": [1]}, "an object is wanted"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
def test_what_is_not_understood_is_refused_in_words(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        read(tmp_path, {**LLAMA, **change})
    assert "config.json: " in str(refused.value)
    assert "--tables FOLDER" in str(refused.value)


def test_layers_without_attention_are_refused_where_they_cannot_be_read(tmp_path: Path) -> None:
    """Half of its layers have no attention, and its feed-forward sizes differ by layer."""
    with pytest.raises(ValueError, match="nemotron-nas"):
        read(tmp_path, published("Nemotron-Super-49B"))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null"])
def test_files_that_are_no_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        model_from_config(tmp_path)


def test_a_folder_without_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        model_from_config(tmp_path)
