"""What check_layers says of SGLang's own model classes, tiny and with random weights, as JSON by module of SGLang's.

A program of its own: SGLang's runtime is one for each process.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any

from sglang_deltastore.host import activate, model_path
from sglang_deltastore.host.server_process import free_port

SIZES = {
    "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "num_hidden_layers": 4, "vocab_size": 256, "max_position_embeddings": 512,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SHARED_KV = {
    "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": 256, "activation_sparsity_pattern": [0.0] * 4,
}  # fmt: skip

#: module of sglang.srt.models -> (class, class of its configuration in transformers, fields besides SIZES)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", EXPERTS),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4}),
    "gemma3_causal": ("Gemma3ForCausalLM", "Gemma3TextConfig", {}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {}),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {}),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", {}),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", {}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {"num_local_experts": 4}),
    "gemma3n_causal": ("Gemma3nForCausalLM", "Gemma3nTextConfig", SHARED_KV),
    "iquest_loopcoder": ("IQuestLoopCoderForCausalLM", "LlamaConfig", {"loop_num": 2}),
    "transformers": ("TransformersForCausalLM", "SmolLM3Config", {"pad_token_id": 0}),
}


def start_runtime() -> None:
    """What SGLang's scheduler sets up before it builds a model."""
    from sglang.srt.distributed import bootstrap
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    server_args = ServerArgs(model_path=str(model_path("smollm2")), device="cpu", attention_backend="torch_native")
    server_args.resolve_once()
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    bootstrap.init_parallel_runtime(server_args=server_args, device="cpu", dist_port=free_port())


def verdict(module: str) -> str:
    """ "served", or the refusal."""
    import transformers

    from sglang_deltastore.policy.layer_rules import check_layers
    from sglang_deltastore.policy.refusals import Refused
    from sglang_deltastore.seam.deployment import attention_layers

    name, config_name, fields = MODELS[module]
    config = getattr(transformers, config_name)(**SIZES, **fields)
    config.architectures = [name]
    model = getattr(import_module(f"sglang.srt.models.{module}"), name)(config=config, quant_config=None)
    try:
        check_layers(attention_layers(model), model)
    except Refused as refusal:
        return str(refusal)
    return "served"


if __name__ == "__main__":
    activate()
    start_runtime()
    json.dump({module: verdict(module) for module in MODELS}, sys.stdout)
