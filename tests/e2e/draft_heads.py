"""Heads that draft for a Llama, as folders that SGLang serves: what they say is no good, but known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def echo(model: Path, folder: Path) -> Path:
    """An EAGLE head whose layer adds nothing: behind a token it says what the model said behind the one before, and so
    the token itself again."""
    config = _save_config(model, folder, "LlamaForCausalLMEagle")
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    query, kv = (config[f"num_{side}_heads"] * config["head_dim"] for side in ("attention", "key_value"))
    shapes = {
        "self_attn.q_proj": (query, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, query), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    weights = {f"layers.0.{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    # Of a token's embedding, and of the model's hidden state behind the one before.
    weights["fc.weight"] = torch.cat((torch.zeros(hidden, hidden), torch.eye(hidden)), dim=1)
    weights["fc.bias"] = torch.zeros(hidden)
    save_file(weights, folder / "model.safetensors")
    return folder


def eagle3(model: Path, folder: Path) -> Path:
    """An EAGLE-3 head without weights, for --speculative-draft-load-format dummy."""
    _save_config(model, folder, "LlamaForCausalLMEagle3", draft_vocab_size="vocab_size")
    return folder


def _save_config(model: Path, folder: Path, architecture: str, **copied: str) -> dict[str, Any]:
    """The model's own with one layer, and with fields copied from others, in a folder that need not be there."""
    folder.mkdir(exist_ok=True)
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": [architecture], "num_hidden_layers": 1, "tie_word_embeddings": False}
    config |= {name: config[field] for name, field in copied.items()}
    (folder / "config.json").write_text(json.dumps(config))
    for file in model.glob("tokenizer*"):
        shutil.copy(file, folder)
    return config
