"""Tiny models of random weights in the shape of real families, as folders that SGLang serves."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
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


def phi3() -> PreTrainedConfig:
    """96 dims a head, in one projection."""
    return Phi3Config(
        vocab_size=4096, hidden_size=384, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=2048, original_max_position_embeddings=2048, pad_token_id=0,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def stablelm(head_dim: int, kv_heads: int) -> PreTrainedConfig:
    """80 dims a head, as StableLM-3B, or 160, as StableLM-2-12B."""
    return StableLmConfig(
        vocab_size=4096, hidden_size=4 * head_dim, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip


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
    made(config, seed).save_pretrained(folder)
    return folder
