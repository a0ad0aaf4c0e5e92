"""The families: for each the shape of its attention, a tiny configuration of it, and what is promised of it.

A family that becomes served needs one line changed here, and `make results-models`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .processors import IDS, Processor

State = Literal["served", "gpu only", "refused", "not here"]
"""What is promised. served: it agrees with its judge. gpu only: refused at start on a CPU, by name, and served on a
GPU; tests/e2e/test_hybrids.py lifts what a CPU lacks and compares. refused: at start, by name. not here: SGLang itself,
without DeltaStore, does not serve it on this host, so that nothing can be measured."""

WINDOW_TOKENS = 64
"""Far fewer than the prompts have."""

IMPLIED = object()
"""In place of a value: a field that the configuration derives by itself, and takes from nobody."""

_SIZES = {
    "vocab_size": 4096, "intermediate_size": 256, "num_hidden_layers": 4, "max_position_embeddings": 2048,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One kind of model.

    heads: (query heads, KV heads, head_dim) of the tiny model, in the proportions of the true one. config: a class of
    transformers; fields: of it, over the sizes; also: what the Hub's config.json says and transformers does not write.
    judge: whose log-probabilities are the right ones. says: a part of the message where it is not served. towers: what
    a configuration has beside that of its text model; processor: what its images need. auto: the class of transformers
    that makes the model. average: of differences; the median where one expert alone answers a token, and the last digit
    of a key picks now and then. options: what SGLang wants to be told here.
    """

    like: str
    attention: str
    heads: tuple[int, int, int]
    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    also: dict[str, Any] = field(default_factory=dict)
    judge: Literal["stock", "transformers"] = "stock"
    state: State = "served"
    says: str = ""
    towers: dict[str, Any] = field(default_factory=dict)
    processor: Processor | None = None
    auto: str = "AutoModelForCausalLM"
    average: Literal["mean", "median"] = "mean"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def auto_class(self) -> str:
        return "AutoModelForImageTextToText" if self.towers else self.auto

    def config_fields(self) -> dict[str, Any]:
        """Arguments of the configuration's class; those of the text model alone where there are towers."""
        query_heads, kv_heads, head_dim = self.heads
        shape = {
            "num_attention_heads": query_heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "hidden_size": query_heads * head_dim,
        }
        text = {name: value for name, value in (_SIZES | shape | self.fields).items() if value is not IMPLIED}
        return {"text_config": text} | self.towers if self.towers else text


#: all are asked for every token: which are the best two of eight hangs on the last digit of a key now and then
_EXPERTS = 4


def _experts(**more: Any) -> dict[str, Any]:
    return {"num_experts": _EXPERTS, "num_experts_per_tok": _EXPERTS, "moe_intermediate_size": 64} | more


def _local_experts(**more: Any) -> dict[str, Any]:
    return {"num_local_experts": _EXPERTS, "num_experts_per_tok": _EXPERTS} | more


def _alternating(*kinds: str) -> dict[str, Any]:
    """layer_types of four layers, and a window."""
    return {"layer_types": [f"{kind}_attention" for kind in kinds], "sliding_window": WINDOW_TOKENS}


_SWA_THEN_FULL = _alternating("sliding", "full", "sliding", "full")
_THREE_TO_ONE = _alternating("sliding", "sliding", "sliding", "full")
_GEMMA = {"hidden_size": 256, "tie_word_embeddings": True}
_MLA = {"kv_lora_rank": 64, "q_lora_rank": None, "qk_rope_head_dim": 16, "qk_nope_head_dim": 48, "v_head_dim": 64}
_MLA_EXPERTS = {
    "n_routed_experts": _EXPERTS, "num_experts_per_tok": _EXPERTS, "moe_intermediate_size": 64,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_MLA_SAYS = "the attention architecture is MLA"
_STATES = "a kind of layer is"
_ON_A_GPU = "a hybrid's platform is"
_NO_CODE = "has no SGlang implementation"
_LINEAR_THEN_FULL = {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}
_DELTA_NET = _LINEAR_THEN_FULL | {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
_GPT2_NAMES = {"n_embd": 256, "n_head": 4, "n_layer": 4, "n_positions": 2048,
               "tie_word_embeddings": True}  # fmt: skip
_MROPE = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
_VIT = {"depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "patch_size": 14}
_DEEPSTACK_VIT = _VIT | {"out_hidden_size": 512, "patch_size": 16, "deepstack_visual_indexes": [0, 1]}
_BLOCKS = {"layers_block_type": ["mamba", "mlp", "attention", "mlp"]}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 1,
           "mamba_d_ssm": 256}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "llama-d64": Family("Llama-3.2-1B", "GQA 4:1", (8, 2, 64), "LlamaConfig"),
    "llama-d128": Family("Llama-3.1-8B", "GQA 4:1", (4, 1, 128), "LlamaConfig"),
    "qwen2": Family("Qwen2.5-7B", "GQA 7:1, biases", (7, 1, 128), "Qwen2Config"),
    "qwen3": Family("Qwen3-8B", "GQA, norms of q and k", (4, 2, 128), "Qwen3Config", {"hidden_size": 256}),
    "qwen3-moe": Family("Qwen3-30B-A3B", "GQA 8:1, norms of q and k, experts", (8, 1, 128), "Qwen3MoeConfig",
                        _experts(hidden_size=256)),
    "mixtral": Family("Mixtral-8x7B", "GQA 4:1, experts", (4, 1, 128), "MixtralConfig", _local_experts()),
    "mistral-swa": Family("Mistral-7B-v0.1", "GQA 4:1, window in the configuration", (4, 1, 128), "MistralConfig",
                          {"sliding_window": WINDOW_TOKENS}),
    "ministral3": Family("Ministral-3-8B", "GQA 4:1, queries scaled by position", (4, 1, 128), "Ministral3Config"),
    "gemma1": Family("Gemma-2B", "MQA", (4, 1, 256), "GemmaConfig", _GEMMA,
                     {"hidden_act": "gelu_pytorch_tanh"}),
    "gemma2": Family("Gemma-2-9B", "GQA 2:1, every second layer a window, soft cap 50", (4, 2, 256), "Gemma2Config",
                     _GEMMA | _SWA_THEN_FULL, {"hidden_act": "gelu_pytorch_tanh"},
                     judge="transformers"),  # torch_native, stock's attention on a CPU, has no soft cap
    "gemma3-text": Family("Gemma-3-1B", "GQA 4:1, windows but every sixth layer", (4, 1, 256), "Gemma3TextConfig",
                          _GEMMA | _THREE_TO_ONE),
    "gemma3n-text": Family("Gemma-3n-E2B", "GQA, windows, layers that share KV", (4, 1, 256), "Gemma3nTextConfig",
                           _GEMMA | {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 4096,
                            "activation_sparsity_pattern": [0.0] * 4, **_SWA_THEN_FULL},
                           state="not here"),
    "gemma4-text": Family("Gemma-4-31B's text", "GQA, windows, head_dim 512 where full", (4, 2, 256),
                          "Gemma4TextConfig", _GEMMA | {"global_head_dim": 512, **_THREE_TO_ONE},
                          state="not here"),
    "gpt-oss": Family("gpt-oss-20b", "GQA 8:1, every second layer a window, sinks, experts", (8, 1, 64),
                      "GptOssConfig", _local_experts(hidden_size=256, **_SWA_THEN_FULL), judge="transformers",
                      options={"moe_runner_backend": "triton"}),
    "phi2": Family("Phi-2", "MHA, partial rotary", (4, 4, 80), "PhiConfig"),
    "phi3": Family("Phi-3-mini", "MHA", (4, 4, 96), "Phi3Config"),
    "phi4": Family("Phi-4", "GQA 4:1", (4, 1, 128), "Phi3Config"),
    "phi4-mini": Family("Phi-4-mini", "GQA 3:1, partial rotary", (6, 2, 128), "Phi3Config",
                        {"partial_rotary_factor": 0.75}),
    "phimoe": Family("Phi-3.5-MoE", "GQA 4:1, biases, experts", (4, 1, 128), "PhimoeConfig",
                     _local_experts(num_experts_per_tok=2),
                     {"architectures": ["PhiMoEForCausalLM"]}, average="median"),
    "glm4": Family("GLM-4-9B-0414", "GQA 16:1, partial rotary", (16, 1, 128), "Glm4Config", {"hidden_size": 256}),
    "glm4-moe": Family("GLM-4.5-Air", "GQA 12:1, partial rotary, norms of q and k, experts", (12, 1, 128),
                       "Glm4MoeConfig", {"hidden_size": 256, "use_qk_norm": True, **_MLA_EXPERTS}),
    "glm4-moe-lite": Family("GLM-4.7-Flash", "MLA", (4, 4, 64), "Glm4MoeLiteConfig", _MLA | _MLA_EXPERTS,
                            state="refused", says=_MLA_SAYS),
    "deepseek-v2-lite": Family("DeepSeek-V2-Lite", "MLA", (4, 4, 64), "DeepseekV2Config", _MLA | _MLA_EXPERTS,
                               state="refused", says=_MLA_SAYS),
    "deepseek-v3": Family("DeepSeek-V3, Kimi-K2", "MLA", (4, 4, 64), "DeepseekV3Config",
                          _MLA | _MLA_EXPERTS | {"q_lora_rank": 64}, state="refused", says=_MLA_SAYS),
    "minimax-m2": Family("MiniMax-M2", "GQA 6:1, partial rotary, norms of q and k, experts", (6, 1, 128),
                         "MiniMaxM2Config", _local_experts(hidden_size=256, rotary_dim=64),
                         {"scoring_func": "sigmoid", "use_qk_norm": True, "use_routing_bias": True}, state="not here"),
    "minimax-text-01": Family("MiniMax-Text-01", "lightning attention, full every 8th", (4, 1, 128), "MiniMaxConfig",
                              _local_experts(**_LINEAR_THEN_FULL), state="refused", says=_STATES),
    "olmo2": Family("OLMo-2-7B", "MHA, norms over all heads", (4, 4, 128), "Olmo2Config"),
    "olmo3": Family("OLMo-3-7B", "MHA, windows 3:1", (4, 4, 128), "Olmo3Config", _THREE_TO_ONE),
    "olmoe": Family("OLMoE-1B-7B", "MHA, norms of q and k, experts", (4, 4, 128), "OlmoeConfig", _experts()),
    "granite": Family("Granite-3.3-8B", "GQA 4:1, multipliers", (4, 1, 128), "GraniteConfig",
                      {"attention_multiplier": 0.0078125, "residual_multiplier": 0.22, "logits_scaling": 1.0,
                       "embedding_multiplier": 12.0}),
    "granite-hybrid": Family("Granite-4.0-H", "Mamba-2, few GQA layers", (4, 1, 64), "GraniteMoeHybridConfig",
                             {"layer_types": ["mamba", "mamba", "mamba", "attention"], **_MAMBA2},
                             state="gpu only", says=_ON_A_GPU),
    "command-r": Family("Command-R", "GQA, no norms", (4, 1, 128), "CohereConfig", {"tie_word_embeddings": True}),
    "cohere2": Family("Command-R7B", "GQA, windows 3:1, full layers without positions", (4, 1, 128), "Cohere2Config",
                      {"tie_word_embeddings": True, **_THREE_TO_ONE}),
    "gpt2": Family("GPT-2", "MHA, learned positions", (4, 4, 64), "GPT2Config", _GPT2_NAMES),
    "gpt-neox": Family("Pythia", "MHA, partial rotary; on Transformers", (4, 4, 64), "GPTNeoXConfig"),
    "opt": Family("OPT-1.3B", "MHA, learned positions", (4, 4, 64), "OPTConfig",
                  {"ffn_dim": 256, "word_embed_proj_dim": 256, "tie_word_embeddings": True}),
    "stablelm-d64": Family("StableLM-2-1.6B", "MHA, partial rotary", (4, 4, 64), "StableLmConfig"),
    "stablelm-d80": Family("StableLM-3B", "MHA, partial rotary", (4, 4, 80), "StableLmConfig"),
    "stablelm-d160": Family("StableLM-2-12B", "GQA 4:1, partial rotary", (4, 1, 160), "StableLmConfig"),
    "starcoder2": Family("StarCoder2-7B", "GQA 12:1, window in the configuration", (12, 1, 128), "Starcoder2Config",
                         {"sliding_window": WINDOW_TOKENS}),
    "smollm3": Family("SmolLM3-3B", "GQA 4:1, every 4th layer without positions; on Transformers", (4, 1, 128),
                      "SmolLM3Config"),
    "seed-oss": Family("Seed-OSS-36B", "GQA 10:1, biases; on Transformers", (10, 1, 128), "SeedOssConfig",
                       {"hidden_size": 256}),
    "ernie4.5": Family("ERNIE-4.5-0.3B", "GQA 8:1, interleaved rotary; on Transformers", (8, 1, 128),
                       "Ernie4_5Config", {"hidden_size": 256}),
    "nemotron": Family("Nemotron-4-Mini", "GQA 3:1, partial rotary; on Transformers", (6, 2, 128), "NemotronConfig",
                       state="not here"),
    "exaone4": Family("EXAONE-4.0-32B", "GQA, windows 3:1, full layers without positions", (4, 1, 128),
                      "Exaone4Config", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                                        "rms_norm_eps": 1e-6, **_THREE_TO_ONE},  # what SGLang reads, and takes
                      {"sliding_window_pattern": "LLLG"}, judge="transformers"),
    "hunyuan-dense": Family("Hunyuan-7B", "GQA 4:1, norms of q and k behind rotary", (4, 1, 128),
                            "HunYuanDenseV1Config", {}, {"use_qk_norm": True}, state="not here"),
    "apertus": Family("Apertus-8B", "GQA 4:1, norms of q and k", (4, 1, 128), "ApertusConfig"),
    "arcee": Family("AFM-4.5B", "GQA 4:1", (4, 1, 128), "ArceeConfig"),
    "solar-open": Family("Solar-Open-100B", "GQA, experts", (8, 1, 128), "SolarOpenConfig",
                         {"hidden_size": 256, **_MLA_EXPERTS}),
    "mimo-v2": Family("MiMo-V2-Flash", "GQA, windows, sinks, keys of 192 and values of 128", (4, 1, 192),
                      "MiMoV2FlashConfig", {"v_head_dim": 128, "hidden_size": 256, **_MLA_EXPERTS, **_THREE_TO_ONE},
                      {"hybrid_layer_pattern": [1, 1, 1, 0], "moe_layer_freq": [0, 1, 1, 1], "swa_head_dim": 192,
                       "swa_v_head_dim": 128, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 1,
                       "sliding_window_size": WINDOW_TOKENS, "layernorm_epsilon": 1e-5}, state="not here"),
    "qwen2-moe": Family("Qwen1.5-MoE", "MHA, experts", (4, 4, 128), "Qwen2MoeConfig",
                        _experts(shared_expert_intermediate_size=64, hidden_size=512), state="not here"),
    "qwen3-next": Family("Qwen3-Next-80B-A3B", "gated delta net, gated GQA every 4th, experts", (4, 1, 256),
                         "Qwen3NextConfig", _experts(hidden_size=256, shared_expert_intermediate_size=64, **_DELTA_NET),
                         {"full_attention_interval": 4}, state="gpu only", says=_ON_A_GPU),
    "qwen3.5": Family("Qwen3.6-27B's text", "gated delta net, gated GQA every 4th", (4, 1, 256), "Qwen3_5TextConfig",
                      {"hidden_size": 256, **_DELTA_NET}, {"full_attention_interval": 4},
                      state="gpu only", says=_ON_A_GPU),
    "llama4-text": Family("Llama-4-Scout's text", "GQA 5:1, chunks, experts", (5, 1, 128), "Llama4TextConfig",
                          _local_experts(num_experts_per_tok=1, intermediate_size_mlp=256, hidden_size=256,
                                         attention_chunk_size=WINDOW_TOKENS),
                          state="refused", says="layer_types with chunked_attention"),
    "falcon-h1": Family("Falcon-H1", "Mamba-2 beside GQA in each layer", (4, 1, 64), "FalconH1Config", _MAMBA2,
                        state="gpu only", says=_ON_A_GPU),
    "nemotron-h": Family("Nemotron-H-8B", "Mamba-2, few GQA layers", (4, 1, 128), "NemotronHConfig",
                         {"num_hidden_layers": IMPLIED, "mamba_num_heads": 4, "mamba_head_dim": 64,
                          "ssm_state_size": 16, "n_groups": 1, **_BLOCKS}, _BLOCKS,
                         state="gpu only", says=_ON_A_GPU),
    "jamba": Family("Jamba-1.5", "Mamba-1, full every 8th, experts", (4, 1, 64), "JambaConfig",
                    _experts(attn_layer_period=4, attn_layer_offset=3, mamba_d_state=16),
                    state="refused", says=_STATES),
    "lfm2": Family("LFM2-1.2B", "short convolutions, some GQA layers", (8, 2, 64), "Lfm2Config",
                   {"layer_types": ["conv", "conv", "full_attention", "conv"]}, state="refused", says=_STATES),
    "falcon-mqa": Family("Falcon-7B", "MQA", (8, 1, 64), "FalconConfig", {"head_dim": IMPLIED},
                         state="not here", says=_NO_CODE),
    "mpt": Family("MPT-7B", "MHA, ALiBi", (4, 4, 64), "MptConfig", {"d_model": 256, "n_heads": 4, "n_layers": 4},
                  state="not here", says=_NO_CODE),
    "bloom": Family("BLOOM", "MHA, ALiBi", (4, 4, 64), "BloomConfig", {"n_layer": 4, "n_head": 4}, state="not here",
                    says=_NO_CODE),
    "qwen2.5-vl": Family("Qwen2.5-VL-7B, text prompts", "GQA 4:1, M-RoPE", (4, 1, 128), "Qwen2_5_VLConfig",
                         {"rope_scaling": _MROPE}, towers={"vision_config": _VIT | {"out_hidden_size": 512}} | IDS,
                         processor=Processor("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor")),
    "qwen3-vl": Family("Qwen3-VL-8B, text prompts", "GQA 4:1, interleaved M-RoPE, norms of q and k", (4, 1, 128),
                       "Qwen3VLConfig", {"rope_scaling": _MROPE}, towers={"vision_config": _DEEPSTACK_VIT} | IDS,
                       processor=Processor("Qwen3VLProcessor", "Qwen3VLVideoProcessor")),
    "whisper": Family("Whisper", "encoder and decoder", (4, 4, 64), "WhisperConfig",
                      {"d_model": 256, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
                       "decoder_attention_heads": 4, "num_mel_bins": 16},
                      state="refused", says="is_encoder_decoder is True", auto="AutoModelForSpeechSeq2Seq"),
    "bert": Family("BERT, embeddings", "MHA in both directions", (4, 4, 64), "BertConfig", state="refused",
                   says="is_generation is False", auto="AutoModel"),
    "lying": Family("a Llama whose configuration names another head_dim than its weights have", "GQA 4:1", (4, 1, 64),
                    "LlamaConfig", also={"head_dim": 32}, state="refused", says="have k_proj of [64] rows"),
}  # fmt: skip
