"""What tiny models with a vision tower say of prompts with an image, through stock and through ours, as JSON.

A program of its own: its engines are forked from one import of SGLang.
"""

from __future__ import annotations

import base64
import io
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.families import engines
from benchmarks.families.measure import OURS, STOCK
from benchmarks.families.shapes import FAMILIES
from benchmarks.families.weights import save

WORDS_BEFORE, WORDS_BEHIND, SCORED = 150, 60, 40


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
            engines.in_a_child(partial(save, FAMILIES[name], folder), log)
            sides = {"stock": STOCK | shared, "raw": OURS | shared | {"kv_compress_tier": "raw"}}
            found[name] = {
                side: engines.in_a_child(partial(answers, folder, options), log) for side, options in sides.items()
            }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
