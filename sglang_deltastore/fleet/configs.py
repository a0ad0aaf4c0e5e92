"""A model from its Hugging Face config.json: which layers keep KV or a state, and the bytes of its weights.

transformers reads the file and builds the network without memory (torch's meta device). Whatever it knows is so counted
as it is: tied embeddings, two-matrix MLPs, experts, towers for images, fields that the file leaves out. Code that comes
with a checkpoint (`auto_map`) is never run. What is not understood is refused in words, for a wrong plan costs more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .tables import Model

KV_KINDS = ("full_attention", "sliding_attention", "chunked_attention")
"""Layers that keep keys and values of every token; a window hides tokens from attention and frees no memory here."""
STATE_KINDS = ("linear_attention", "conv", "mamba")
"""Layers that keep one state of fixed size for each sequence."""
CACHELESS_KINDS = ("mlp", "moe")
_CONV_BYTES = 2
_STATE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: fields that say a state's heads, head_dim, state size, groups and convolution kernel, by who names them so
_STATE_FIELDS = (
    ("linear_num_value_heads", "linear_value_head_dim", "linear_key_head_dim", "linear_num_key_heads",
     "linear_conv_kernel_dim"),  # gated delta nets: Qwen3-Next
    ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel"),  # Mamba-2: Nemotron-H
    ("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups", "mamba_d_conv"),  # Mamba-2: Granite 4, Bamba
)  # fmt: skip
_OTHER_KV_HEADS = ("multi_query", "num_kv_heads", "n_head_kv", "multi_query_group_num")
_NOT_THE_NETWORK = {"model_type", "quantization_config", "auto_map", "_name_or_path", "dtype", "torch_dtype"}
_BY_HAND = "Or give its layers, kv_heads, head_dim and parameters in a models.toml, and pass --tables FOLDER"


def model_from_config(path: Path) -> Model:
    """Read a config.json, or a folder with one. Raises ValueError for what is no decoder-only model with plain keys
    and values, and for what is not understood."""
    path = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a Hugging Face config.json: {error}") from None
    try:
        if not isinstance(fields, dict):
            raise ValueError(f"a JSON object is wanted, not {type(fields).__name__}")
        return _model(path.absolute().parent.name or "model", fields, path.name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}. {_BY_HAND}") from error


def _model(name: str, fields: dict[str, Any], source: str) -> Model:
    from .weights import weights_bytes

    config, section = _configuration(fields)
    text = config.get_text_config(decoder=True)
    _refuse_foreign(config, text)
    network = _network(config)
    kinds = _layer_kinds(text, network)
    heads, kv_heads, head_dim = _heads(text)
    kv_layers = sum(kind in KV_KINDS for kind in kinds)
    state_bytes = sum(_state_bytes(text, kind) for kind in kinds if kind in STATE_KINDS)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    quantization = fields.get("quantization_config") or section.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise ValueError(f"quantization_config is {quantization!r}: an object is wanted")
    if state_bytes:
        source += (
            f": {kv_layers} of {len(kinds)} layers keep KV, others a state of {state_bytes:,} bytes a sequence; "
            "DeltaStore refuses such models so far, its tiers are a what-if"
        )
    per_parameter = weights_bytes(network, quantization) / parameters
    return Model(name, kv_layers, heads, kv_heads, head_dim, parameters, per_parameter, source, state_bytes)


def _configuration(fields: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """transformers' configuration, and the part of the file that describes the decoder."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, reader = fields.get("model_type"), f"transformers {transformers.__version__}"
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(f"model_type is {kind!r}, which {reader} does not know")
    section = next((fields[key] for key in ("text_config", "llm_config") if isinstance(fields.get(key), dict)), fields)
    aliases = CONFIG_MAPPING[kind].attribute_map
    for wanted, others in (
        ("hidden_size", ()),
        ("num_hidden_layers", ("layers_block_type", "hybrid_override_pattern")),
    ):
        if all(section.get(name) is None for name in (wanted, aliases.get(wanted), *others)):
            raise ValueError(f"{wanted} is missing; is this a decoder-only model's config.json?")
    kept = {key: value for key, value in fields.items() if key not in _NOT_THE_NETWORK}
    try:
        config = transformers.AutoConfig.for_model(kind, **kept)
        text = config.get_text_config(decoder=True)
    except Exception as error:  # transformers raises whatever its classes meet in fields of other types
        raise ValueError(f"{reader} cannot read it: {' '.join(str(error).split())[:300]}") from error
    if text is not config and "tie_word_embeddings" not in fields:  # the decoder's own word, as SGLang takes it
        config.tie_word_embeddings = text.tie_word_embeddings
    return config, section


def _refuse_foreign(config: Any, text: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("is_encoder_decoder is true: only decoder-only models are planned")
    for field, meaning in (
        ("kv_lora_rank", "latents instead of keys and values (MLA)"),
        ("num_kv_shared_layers", "layers that share one KV cache"),
    ):
        if value := getattr(text, field, None):
            raise ValueError(f"{field} is {value!r}: {meaning} are not planned")


def _network(config: Any) -> Any:
    """The network on torch's meta device: shapes alone, no memory."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as WITH_IMAGES
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would advise kernels for a network that never runs
    try:
        with torch.device("meta"):
            if type(config) in WITH_IMAGES:
                return WITH_IMAGES[type(config)](config)
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # as above
        raise ValueError(f"transformers cannot build it: {' '.join(str(error).split())[:300]}") from error
    finally:
        logging.set_verbosity(verbosity)


def _layer_kinds(text: Any, network: Any) -> list[str]:
    """What each layer keeps, checked against the modules that the decoder has."""
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    kinds = list(kinds or ["full_attention"] * text.num_hidden_layers)
    if unknown := sorted(set(kinds) - {*KV_KINDS, *STATE_KINDS, *CACHELESS_KINDS}):
        raise ValueError(
            f"layers of kind {', '.join(map(repr, unknown))}: known are {', '.join((*KV_KINDS, *STATE_KINDS))}"
        )
    named = sum(kind in KV_KINDS for kind in kinds)
    built = sum(type(module).__name__.endswith("Attention") for module in network.get_decoder().modules())
    if built != named or not named:
        raise ValueError(
            f"its configuration names {named} layers with keys and values, transformers builds {built} attention "
            "modules: which keep KV is not understood"
        )
    return kinds


def _heads(text: Any) -> tuple[int, int, int]:
    """Query heads, KV heads and head_dim, the same in every layer."""
    heads, kv_heads = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    if kv_heads is None:
        if others := [field for field in _OTHER_KV_HEADS if getattr(text, field, None)]:
            raise ValueError(f"{', '.join(others)} instead of num_key_value_heads: not understood")
        kv_heads = heads
    for field, value in (("num_attention_heads", heads), ("num_key_value_heads", kv_heads)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{field} is {value!r}: one number for all layers is understood")
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    if (value_dim := getattr(text, "v_head_dim", None) or head_dim) != head_dim:
        raise ValueError(f"head_dim is {head_dim} and v_head_dim {value_dim}: equal ones are understood")
    return heads, kv_heads, head_dim


def _state_bytes(text: Any, kind: str) -> int:
    """One layer's state of one sequence, as SGLang keeps it: the convolution's last inputs in 16 bits, the recurrent
    state in float32 unless the configuration says otherwise."""
    if kind == "conv" and (taps := getattr(text, "conv_L_cache", None)):
        return text.hidden_size * (taps - 1) * _CONV_BYTES
    for names in _STATE_FIELDS:
        values = [getattr(text, name, None) for name in names]
        if all(type(value) is int for value in values):
            heads, head_dim, state, groups, kernel = values
            number_bytes = _STATE_BYTES[getattr(text, "mamba_ssm_dtype", None) or "float32"]
            conv = (heads * head_dim + 2 * groups * state) * (kernel - 1) * _CONV_BYTES
            return conv + heads * head_dim * state * number_bytes
    raise ValueError(f"the state of its {kind} layers is not understood")
