"""What we cannot serve is refused at start: what was given, what is allowed, what to do."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from deltastore_kernels.layout import HEAD_DIMS

from . import options
from .tiers import Tier

TESTED_VERSIONS = ("0.5.23",)
"""Versions of SGLang that the whole test suite has passed with."""

SERVED_DEVICES = ("cpu", "cuda")


ATTENTION_LAYERS = ("full_attention", "sliding_attention", "attention")
"""Kinds in a configuration's layer_types that one KV pool serves."""

_OF_STATE_LAYERS = (
    "linear_attn_config",
    "linear_num_value_heads",
    "mamba_d_state",
    "mamba_state_size",
    "ssm_state_size",
)
"""Fields that only configurations of hybrid models have."""


SERVED_HYBRIDS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "falcon_h1", "nemotron_h", "granitemoehybrid")
"""model_type of hybrids whose attention layers are served; SGLang keeps their other layers' states as always."""


READS_THE_MODELS_KV = frozenset({"Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"})
"""Architectures of draft models for which SGLang makes EAGLE and NEXTN an algorithm of another name."""


class Refused(ValueError):
    """The server was asked for something that DeltaStore cannot serve."""


def check_version() -> None:
    """Raises Refused unless the installed SGLang is one we have been tested with."""
    found = version("sglang")
    if found not in TESTED_VERSIONS:
        raise Refused(
            f"--kv-compress deltastore: SGLang {found} is installed; tested are "
            f"{', '.join(TESTED_VERSIONS)}; run: pip install sglang=={TESTED_VERSIONS[-1]}"
        )


def check_options(given: options.Given, defaults: options.Given) -> None:
    """Raises Refused for an option, as the user gave it, that excludes DeltaStore. Both are values by field of SGLang's
    ServerArgs; defaults are those of a record to which nothing was given."""
    for rule in options.broken(given, defaults):
        raise Refused(
            f"--kv-compress deltastore with {rule.option} {given[rule.field]}: allowed is "
            f"{rule.allowed(defaults.get(rule.field))}, because {rule.why}; {rule.advice}"
        )


def check_flags(given: dict[str, Any]) -> None:
    """Raises Refused for a --kv-compress flag without the one that switches DeltaStore on: plain KV would be served
    under its name. given: what the user set, by the flag's name as an argument of Engine."""
    mode, others = given.get("kv_compress", "unset"), [name for name in given if name != "kv_compress"]
    if others and mode != "deltastore":
        flag = "--" + others[0].replace("_", "-")
        raise Refused(
            f"{flag} {given[others[0]]} with --kv-compress {mode}: allowed is --kv-compress deltastore, because "
            f"nothing is compressed without; add --kv-compress deltastore, or drop {flag}"
        )
    calibration, tier = given.get("kv_compress_calibration", "auto"), given.get("kv_compress_tier")
    if given.get("kv_compress_calibration_text") and (calibration != "auto" or tier == "raw"):
        flag = "--kv-compress-tier raw" if tier == "raw" else f"--kv-compress-calibration {calibration}"
        raise Refused(
            f"--kv-compress-calibration-text with {flag}: allowed is --kv-compress-calibration auto and a packed tier, "
            "because nobody would read the text otherwise; drop one of the two"
        )


def check_drafts(
    algorithm: str | None, model: str | None, steps: int | None, drafts: int | None, host_memory: bool
) -> None:
    """Raises Refused where a draft model is asked for that cannot be had, or one is given and not asked for. Values of
    --speculative-algorithm, --speculative-draft-model-path, --speculative-num-steps, --speculative-num-draft-tokens;
    host_memory: whether pages are to go there (HiCache)."""
    flag = f"--speculative-algorithm {algorithm or 'unset'}"
    if not options.of_draft_model(algorithm):
        if model:
            raise Refused(
                f"--speculative-draft-model-path with {flag}: allowed is {', '.join(options.DRAFT_MODEL_ALGORITHMS)}, "
                "because nobody would ask that model; drop one of the two"
            )
        return
    if not model:
        raise Refused(
            f"{flag} without --speculative-draft-model-path: allowed is one with it; name a small model of the same "
            "vocabulary (STANDALONE), a head for the model (EAGLE, EAGLE3), or the model itself (NEXTN)"
        )
    if steps and drafts and drafts != steps + 1:
        raise Refused(
            f"--speculative-num-draft-tokens {drafts} with --speculative-num-steps {steps}: allowed is {steps + 1}, "
            "because drafts are a chain behind a request's last token; drop one of the two"
        )
    if host_memory:
        raise Refused(
            f"--enable-hierarchical-cache with {flag}: allowed is --speculative-algorithm NGRAM, because what a draft "
            "model has stored has not been tried there; drop one of the two"
        )


def check_draft_model(draft_config: Any, model_config: Any) -> None:
    """Raises Refused for a draft model whose KV cache beside ours is not proven, from SGLang's configurations of both
    models."""
    name = ", ".join(draft_config.hf_config.architectures or ["a model without architectures"])

    def refuse(what: str, allowed: str, do: str) -> None:
        raise Refused(f"--speculative-draft-model-path with {name}: {what}; allowed is {allowed}; {do}")

    another = "draft with another model, or with --speculative-algorithm NGRAM"
    if READS_THE_MODELS_KV.intersection(draft_config.hf_config.architectures or ()):
        refuse("it reads the model's own KV, as floats", "a draft model that keeps its own", another)
    if (attention := draft_config.attention_arch.name) != "MHA":
        refuse(f"its attention architecture is {attention}", "MHA, MQA or GQA", another)
    if states := state_layers(getattr(draft_config, "hf_text_config", None)):
        refuse(f"it has {states}", "attention in every layer", another)
    if draft_config.vocab_size != model_config.vocab_size:
        refuse(
            f"its vocabulary has {draft_config.vocab_size} tokens",
            f"{model_config.vocab_size}, as the model's",
            another,
        )
    for side, config in (("the draft model", draft_config), ("the model", model_config)):
        if config.is_hybrid_swa:
            add = "add --disable-hybrid-swa-memory"
            refuse(f"{side} frees what lies behind its windows", "one pool for all layers", add)


def check_canary(share: float, ranks: int, speculative: str | None) -> None:
    """Raises Refused where requests would be sampled (--kv-compress-canary) that cannot be run once more."""
    if share and ranks > 1:
        raise Refused(
            f"--kv-compress-canary {share:g} with --tensor-parallel-size {ranks}: allowed is one rank, because each "
            "decides by its own clock when to run a sequence again, and they would not do so together; drop "
            "--kv-compress-canary"
        )
    if share and speculative:
        raise Refused(
            f"--kv-compress-canary {share:g} with --speculative-algorithm {speculative}: allowed is one token a step, "
            "because a draft's tokens are judged where the canary does not look; drop --kv-compress-canary"
        )


def check_levels(tier: Tier, device: str, kernels: str, host_memory: bool, has_window_pool: bool) -> None:
    """Raises Refused where pages of more than one level cannot be read, or moved. host_memory: whether pages are to go
    there (HiCache); has_window_pool: whether SGLang frees what lies behind the model's windows."""
    fixed = f"or --kv-compress-tier {' or '.join(tier.levels)}"
    on_gpu = device != "cpu" or kernels not in ("auto", "cpu", "reference")
    given = f"--device {device}" if device != "cpu" else f"--kv-compress-kernels {kernels}"
    for is_so, with_what, allowed, why, instead in (
        (on_gpu, given, "a CPU", "kernels for GPUs read pages of one format so far", "add --device cpu"),
        (
            host_memory, "--enable-hierarchical-cache", "one memory",
            "what was copied there would be of another level than its page", "drop --enable-hierarchical-cache",
        ),
        (
            has_window_pool, "this model", "one pool for all layers",
            "levels beside pages that are freed behind windows have not been tried", "add --disable-hybrid-swa-memory",
        ),
    ):  # fmt: skip
        if tier.levels and is_so:
            raise Refused(
                f"--kv-compress-tier {tier.name} with {with_what}: allowed is {allowed}, because {why}; "
                f"{instead}, {fixed}"
            )


def check_foreign_app(variable: str, http_workers: int) -> None:
    """`variable` names an HTTP app that is not ours. Raises Refused where other processes than the launcher would
    import it: they load no plugins."""
    if http_workers > 1:
        raise Refused(
            f"--kv-compress deltastore with {variable} and --tokenizer-worker-num {http_workers}: allowed is one "
            f"worker, as others would not load DeltaStore; unset {variable}, or --tokenizer-worker-num"
        )


def check_device(device: str) -> None:
    """Raises Refused for a device whose kernels do not exist yet."""
    if device not in SERVED_DEVICES:
        raise Refused(
            f"--kv-compress deltastore with --device {device}: allowed is {', '.join(SERVED_DEVICES)}; "
            "kernels for other devices are not there yet; add --device cpu, or --kv-compress none"
        )


def state_layers(text_config: Any) -> str | None:
    """What a configuration says of layers that keep a state, or chunks, in place of a KV cache; None: nothing."""
    if kinds := getattr(text_config, "layer_types", None):
        return next((f"layer_types with {kind}" for kind in kinds if kind not in ATTENTION_LAYERS), None)
    return next((name for name in _OF_STATE_LAYERS if getattr(text_config, name, None)), None)


def check_model(
    model_config: Any,
    show_prompts: bool = False,
    keeps_states: bool = True,
    host_memory: bool = False,
    speculates: bool = False,
) -> None:
    """Raises Refused for a model whose attention we cannot serve, from its configuration alone; or whose prompts we
    cannot show, where that is asked for. keeps_states: whether SGLang keeps a hybrid's states for prefixes of whole
    pages here; host_memory: whether pages are to go there (HiCache); speculates: whether steps bring drafts."""
    name = ", ".join(model_config.hf_config.architectures or ["a model without architectures"])

    def refuse(what: str, got: Any, allowed: str, instead: str = "") -> None:
        raise Refused(
            f"--kv-compress deltastore with {name}: {what} is {got}; allowed is {allowed}; "
            f"serve this model with --kv-compress none{instead}"
        )

    if show_prompts and model_config.is_multimodal:
        raise Refused(
            f"--kv-compress-show-prompts with {name}: allowed is a model of text alone, because an image's tokens are "
            "no words; drop --kv-compress-show-prompts"
        )
    if (attention := model_config.attention_arch.name) != "MHA":
        # A latent gains next to nothing from our codes (kernels/DECISIONS.md).
        instead = ", and --kv-cache-dtype fp8_e4m3 where its latents must be smaller" if attention == "MLA" else ""
        refuse("the attention architecture", attention, "MHA, MQA or GQA", instead)
    text_config = getattr(model_config, "hf_text_config", None)
    if states := state_layers(text_config):
        if getattr(text_config, "model_type", None) not in SERVED_HYBRIDS:
            refuse("a kind of layer", states, f"attention in every layer, or one of {', '.join(SERVED_HYBRIDS)}")
        if not keeps_states:
            refuse("a hybrid's platform", "one where SGLang keeps no states for whole pages", "a GPU")
        if host_memory:
            raise Refused(
                f"--enable-hierarchical-cache with {name}: allowed is a model whose layers are all attention, because "
                "the others' states have not been tried there; drop --enable-hierarchical-cache"
            )
        if speculates:
            raise Refused(
                f"--speculative-algorithm with {name}: allowed is a model whose layers are all attention, because "
                "taking drafts out of the others' states has not been tried; drop --speculative-algorithm"
            )
    _check_windows(model_config, name, host_memory)
    if model_config.is_encoder_decoder:
        refuse("is_encoder_decoder", True, "a decoder-only model")
    if not model_config.is_generation:
        refuse("is_generation", False, "a model that generates text")
    for side in ("head_dim", "v_head_dim"):
        if (dims := getattr(model_config, side)) > max(HEAD_DIMS):
            refuse(side, dims, f"at most {max(HEAD_DIMS)}")


def _check_windows(model_config: Any, name: str, host_memory: bool) -> None:
    """Where SGLang frees what lies behind this model's windows."""
    if not model_config.is_hybrid_swa:
        return
    if host_memory:
        raise Refused(
            f"--enable-hierarchical-cache with {name}: allowed is one pool for all layers, because nodes whose pages "
            "are freed behind windows have not been tried there; add --disable-hybrid-swa-memory"
        )
    if not model_config.full_attention_layer_ids:
        raise Refused(
            f"--kv-compress deltastore with {name}: allowed is one pool for all layers, because each has a window, and "
            "SGLang has pages of one token then; add --disable-hybrid-swa-memory"
        )
