"""What tiny models with a vision tower say of prompts with an image, through stock and through ours, as JSON.

A program of its own: its engines are forked from one import of SGLang.
"""

from __future__ import annotations

import base64
import io
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from benchmarks.families import engines
from benchmarks.families.measure import OURS, STOCK
from benchmarks.families.shapes import FAMILIES
from benchmarks.families.weights import save

WORDS_BEFORE, WORDS_BEHIND, SCORED = 150, 60, 40
SPECIAL = {"<unk>": 3, "<|vision_start|>": 4000, "<|vision_end|>": 4001, "<|image_pad|>": 4002, "<|video_pad|>": 4003}
IDS = {
    "vision_start_token_id": 4000, "vision_end_token_id": 4001, "image_token_id": 4002, "video_token_id": 4003,
}  # fmt: skip


@dataclass(frozen=True)
class Processor:
    """Classes of transformers, and the module of the second."""

    name: str
    video: str
    module: str


PROCESSORS = {
    "qwen2.5-vl": Processor("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", "qwen2_vl"),
    "qwen3-vl": Processor("Qwen3VLProcessor", "Qwen3VLVideoProcessor", "qwen3_vl"),
}


def save_with_processor(name: str, folder: Path) -> None:
    family = replace(FAMILIES[name], towers=FAMILIES[name].towers | IDS)
    save(family, folder)
    vocabulary = {f"w{token_id}": token_id for token_id in range(4096) if token_id not in SPECIAL.values()} | SPECIAL
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", additional_special_tokens=list(SPECIAL)[1:]
    )
    patch = family.towers["vision_config"]["patch_size"]
    of = PROCESSORS[name]
    video = getattr(transformers, of.video)(patch_size=patch)
    getattr(transformers, of.name)(Qwen2VLImageProcessor(patch_size=patch), words, video).save_pretrained(folder)


def words(count: int, step: int) -> str:
    return " ".join(f"w{(step * i * i + 11 * i) % 3900 + 10}" for i in range(count))


PROMPT = f"{words(WORDS_BEFORE, 37)} <|vision_start|><|image_pad|><|vision_end|> {words(WORDS_BEHIND, 31)}"


def image(seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 255, (192, 128, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def answers(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Of the prompt's last words: log-probabilities with an image when nothing is cached, when all of it is, and with
    another image; how many tokens the prompt has, and were found each time."""
    engine = engines.start(folder, **options)

    def ask(seed: int, from_token: int) -> dict[str, Any]:
        answer = engine.generate(
            prompt=PROMPT,
            image_data=[image(seed)],
            sampling_params={"temperature": 0, "max_new_tokens": 1, "ignore_eos": True},
            return_logprob=True,
            logprob_start_len=from_token,
        )
        meta = answer["meta_info"]
        logprobs = [entry[0] for entry in meta["input_token_logprobs"][-SCORED:]]
        return {"logprobs": logprobs, "cached": meta["cached_tokens"], "tokens": meta["prompt_tokens"]}

    cold = ask(1, 0)
    from_token = cold["tokens"] - SCORED - 1
    return {"cold": cold, "hit": ask(1, from_token), "other": ask(2, from_token)}


def main() -> None:
    engines.import_sglang()
    found: dict[str, Any] = {}
    shared = {"skip_tokenizer_init": False}
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as room:
            folder, log = Path(room) / "model", Path(room) / "log"
            engines.in_a_child(partial(save_with_processor, name, folder), log)
            sides = {"stock": STOCK | shared, "raw": OURS | shared | {"kv_compress_tier": "raw"}}
            found[name] = {
                side: engines.in_a_child(partial(answers, folder, options), log) for side, options in sides.items()
            }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
