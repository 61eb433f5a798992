"""The tiny shape of each family, of those that pack and those that cannot, and a model of it."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shoal.models import attention

WORDS = 61
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": None,
}
GLU = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
MLP = {"intermediate_size": 48}
SLIDING = {"sliding_window": 8}
MIXED = SLIDING | {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ONE = {"attention_heads": 4, "num_layers": 2, "ffn_dim": 48}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES | GLU,
    "gpt2": {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": SIZES | MLP,
    "qwen2": SIZES | MLP | {"num_key_value_heads": 2},
    "qwen3": SIZES | GLU,
    "mistral": SIZES | GLU | SLIDING,
    "mixtral": SIZES | GLU | SLIDING | EXPERTS,
    "qwen2_moe": SIZES | MLP | EXPERTS | {"num_key_value_heads": 2, "shared_expert_intermediate_size": 16},
    "qwen3_moe": SIZES | GLU | EXPERTS,
    "gpt_oss": SIZES | GLU | MIXED | EXPERTS,
    "gemma": SIZES | GLU,
    "gemma2": SIZES | GLU | MIXED,
    "gemma3_text": SIZES | GLU | MIXED,
    "phi": SIZES | MLP,
    "phi3": SIZES | MLP | SLIDING,
    "olmo": SIZES | MLP,
    "olmo2": SIZES | MLP,
    "granite": SIZES | MLP | {"logits_scaling": 3.0},
    "cohere": SIZES | MLP,
    "opt": SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "biogpt": SIZES | MLP,
    "xglm": {"vocab_size": WORDS, "d_model": 32, **ONE},
    "bloom": {"vocab_size": WORDS, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": SIZES | {"alibi": True},
    "mpt": {"vocab_size": WORDS, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "lstm": {"vocab_size": WORDS, "hidden_size": 32},
}

CANNOT_PACK: dict[str, dict[str, Any]] = {
    "openai-gpt": {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "mamba": {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "rwkv": {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
}


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = (FAMILIES | CANNOT_PACK)[family]
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **sizes), dtype=torch.float32
    ).eval()
    attention.use_fastest(model)
    for parameter in model.parameters():  # large enough that a leak shows
        parameter.data.mul_(3)
    return model
