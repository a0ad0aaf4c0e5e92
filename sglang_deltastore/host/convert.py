"""Convert a GGUF file to a Hugging Face folder that transformers and SGLang load offline.

**Weights are stored as float16, and `config.json` says bfloat16.** On 1,024 tokens of WikiText-2
against dequantized float32 weights, rounding the weights to float16 costs a KL divergence of 2e-6
(SmolLM2) and 1e-6 (Gemma-3) and no or one top-1 token, rounding them to bfloat16 5e-5 and 1e-4 and
six or seven: float16 loses nothing that matters at half of float32's bytes. Computing is another
matter: Gemma-3's activations reach 1e5, beyond float16's 65,504, so what `--dtype auto` takes from
`config.json` must be bfloat16, in which both models were trained.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .embedded import EmbeddedModel

COMPUTE_DTYPE = "bfloat16"


def convert(model: EmbeddedModel, gguf: Path, folder: Path) -> None:
    """Write `gguf` to the new `folder`: weights, config, generation config, tokenizer.

    Shows its progress on stderr. Takes half a minute of one core for SmolLM2, two for Gemma-3.
    """
    from tqdm import tqdm

    with tqdm(total=4, desc=f"{model.name}: loading transformers", unit="step") as bar, _quiet_transformers():
        bar.update()
        bar.set_description(f"{model.name}: reading the tokenizer")
        tokenizer = _tokenizer(model, gguf)
        bar.update()
        bar.set_description(f"{model.name}: reading the weights")
        network = _network(gguf)
        bar.update()
        bar.set_description(f"{model.name}: writing")
        tokenizer.model_max_length = network.config.max_position_embeddings
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _set_compute_dtype(folder / "config.json")
        shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors: owner only
        bar.update()
        bar.set_description(f"{model.name}: done")


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Import transformers and hide the bars that would run across ours (the one that takes long stays)."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _tokenizer(model: EmbeddedModel, gguf: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if model.adds_bos:  # without it, Gemma-3's perplexity on WikiText-2 is 16.1 instead of 10.2
        tokenizer.add_bos_token = True
    return tokenizer


def _network(gguf: Path) -> Any:
    import accelerate  # noqa: F401  # transformers dequantizes with it: where it is missing, the error names it
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    network = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float16, quantization_config=GgufConfig(dequantize=True)
    )
    config = network.config
    config._name_or_path = ""
    network.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return network


def _set_compute_dtype(config_file: Path) -> None:
    config = json.loads(config_file.read_text())
    config["dtype"] = COMPUTE_DTYPE
    config_file.write_text(json.dumps(config, indent=2) + "\n")
