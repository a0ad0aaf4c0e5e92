"""A random Llama small enough for milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sglang_deltastore.lab.attention import ATTENTION

VOCABULARY = 100
LAYERS = 2
HEADS = 2
ALPHABET = "abcdefghijklmnopqrstuvwxyz .,"


def config(head_dim: int = 32, **changes: object) -> LlamaConfig:
    return LlamaConfig(
        **{
            "hidden_size": 4 * head_dim,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": HEADS,
            "head_dim": head_dim,
            "intermediate_size": 128,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 2048,
            "initializer_range": 0.1,  # the default leaves attention flat: nothing to get wrong
            **changes,
        }
    )


def model(head_dim: int = 32, attention: str = "sdpa", **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    made = LlamaForCausalLM(config(head_dim, **changes)).eval()
    made.set_attn_implementation(attention)
    return made


def save_folder(folder: Path, **changes: object) -> Path:
    """A Hugging Face folder of the model, with a tokenizer of single letters; returns `folder`."""
    model(64, **changes).save_pretrained(folder)
    letters = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(ALPHABET)}, unk_token="."))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(folder)
    return folder


def evicting_model(head_dim: int = 32, **changes: object) -> LlamaForCausalLM:
    return model(head_dim, ATTENTION, **changes)


def token_ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def keys_and_values(batch: int, tokens: int, head_dim: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, H, T, D] each."""
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(batch, HEADS, tokens, head_dim, generator=generator) for _ in range(2))
    return key, value
