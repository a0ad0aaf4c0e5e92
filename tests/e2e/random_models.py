"""Tiny models of random weights in the shape of real families, as folders that SGLang serves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    GptOssConfig,
    GraniteMoeHybridConfig,
    LlamaConfig,
    NemotronHConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    StableLmConfig,
)

#: without a tokenizer: prompts are token ids
ARGUMENTS = ("--skip-tokenizer-init",)


def gpt_oss() -> PreTrainedConfig:
    return GptOssConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=256, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=2, head_dim=64, num_local_experts=4, num_experts_per_tok=2, sliding_window=64,
        max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


#: a gated delta net in three layers of four; full attention with 8 query heads for a KV head, head_dim 256
_GATED_DELTA_NET: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64, "full_attention_interval": 4,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2, "max_position_embeddings": 2048,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def qwen3_next() -> PreTrainedConfig:
    """Each expert serves every token: a choice among them may turn over by a rounding error, and states remember it."""
    return Qwen3NextConfig(
        **_GATED_DELTA_NET, num_experts=4, num_experts_per_tok=4, moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    )  # fmt: skip


def qwen3_5() -> PreTrainedConfig:
    """Its text model, which is served alone as well as behind a vision tower."""
    return Qwen3_5TextConfig(**_GATED_DELTA_NET)


def save_tokenizer(folder: Path) -> None:
    """A token for each byte: what a server needs to calibrate itself for a model."""
    bytes_ = {character: number for number, character in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=bytes_, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


#: Mamba-2 layers; full attention with 4 query heads for a KV head
_MAMBA_2: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 1, "max_position_embeddings": 2048, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def falcon_h1() -> PreTrainedConfig:
    """Both in every layer."""
    return FalconH1Config(
        **_MAMBA_2, head_dim=64, num_hidden_layers=4, mamba_d_ssm=256, mamba_n_heads=4, mamba_d_head=64,
        mamba_d_state=32, mamba_n_groups=1, mamba_expand=2, mamba_chunk_size=64,
    )  # fmt: skip


def nemotron_h() -> PreTrainedConfig:
    return NemotronHConfig(
        **_MAMBA_2, head_dim=64, layers_block_type=["mamba", "mlp", "attention"] * 2, mamba_num_heads=8,
        mamba_head_dim=64, ssm_state_size=32, n_groups=8, expand=2, chunk_size=64,
    )  # fmt: skip


def granite_hybrid() -> PreTrainedConfig:
    """Granite 4: with experts, each for every token, and no positions."""
    return GraniteMoeHybridConfig(
        **_MAMBA_2, num_hidden_layers=6, layer_types=["mamba", "mamba", "attention"] * 2, mamba_n_heads=8,
        mamba_d_head=64, mamba_d_state=32, mamba_n_groups=1, mamba_expand=2, mamba_chunk_size=64, num_local_experts=4,
        num_experts_per_tok=4, shared_intermediate_size=128, residual_multiplier=0.5, attention_multiplier=0.125,
        position_embedding_type="nope",
    )  # fmt: skip


def phi3() -> PreTrainedConfig:
    """96 dims a head, in one projection."""
    return Phi3Config(
        vocab_size=4096, hidden_size=384, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=2048, original_max_position_embeddings=2048, pad_token_id=0,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def stablelm() -> PreTrainedConfig:
    """80 dims a head, as StableLM-3B."""
    return StableLmConfig(
        vocab_size=4096, hidden_size=320, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip


def mimo() -> PreTrainedConfig:
    """MiMo-7B in small: a Qwen2 with a layer that predicts one token more, whose weights are not in the folder."""
    config = Qwen2Config(
        vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config.num_nextn_predict_layers = 1
    return config


def llama(head_dim: int) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=1, head_dim=head_dim, max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def made(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Such a model; weights are large enough for the context to matter to every log-probability."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):  # of the scores' own size; SGLang holds them as bfloat16
                parameter.copy_(torch.linspace(-1, 4, len(parameter)).bfloat16())
            elif name.endswith("bias"):  # keys of gpt-oss have a mean
                parameter.normal_(0, 0.3)
            elif parameter.dim() > 1:
                parameter.mul_(3 if "embed" not in name else 20)
    return model


def save(config: PreTrainedConfig, folder: Path, seed: int = 0) -> Path:
    save_made(made(config, seed), folder)
    return folder


def save_made(model: PreTrainedModel, folder: Path) -> None:
    """With the configuration as it is published, which transformers does not write for all that it reads."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    if fields["model_type"] == "nemotron_h":
        kinds = fields.pop("layers_block_type")
        fields["hybrid_override_pattern"] = "".join(_NEMOTRON_H_LAYERS[kind] for kind in kinds)
        path.write_text(json.dumps(fields))


_NEMOTRON_H_LAYERS = {"linear_attention": "M", "mlp": "-", "full_attention": "*"}
