"""What a model with a vision tower needs beside its weights: a tokenizer of words, and a processor of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

SPECIAL = {
    "<pad>": 0,
    "<unk>": 3,
    "<|vision_start|>": 4000,
    "<|vision_end|>": 4001,
    "<|image_pad|>": 4002,
    "<|video_pad|>": 4003,
}
IDS = {
    "vision_start_token_id": 4000, "vision_end_token_id": 4001, "image_token_id": 4002, "video_token_id": 4003,
}  # fmt: skip


@dataclass(frozen=True)
class Processor:
    """Classes of transformers."""

    whole: str
    videos: str

    def save(self, folder: Path, patch_size: int) -> None:
        """Writes it beside the weights."""
        videos = getattr(transformers, self.videos)(patch_size=patch_size)
        images = Qwen2VLImageProcessor(patch_size=patch_size)
        getattr(transformers, self.whole)(images, _words(), videos).save_pretrained(folder)


def _words() -> PreTrainedTokenizerFast:
    """w0 to w4095, but for the special tokens."""
    vocabulary = {f"w{token_id}": token_id for token_id in range(4096) if token_id not in SPECIAL.values()} | SPECIAL
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    more = [name for name in SPECIAL if name.startswith("<|")]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", additional_special_tokens=more
    )
