"""Model shapes by name: a Hugging Face model type, and where it differs from that type's defaults."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "llama-tiny": {
        "model_type": "llama",
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 344,
        "tie_word_embeddings": True,
    },
    "llama-small": {
        "model_type": "llama",
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "intermediate_size": 1376,
        "tie_word_embeddings": True,
    },
    "llama-124m": {
        "model_type": "llama",
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 2048,
        "tie_word_embeddings": True,
    },
    "gpt2-tiny": {
        "model_type": "gpt2",
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
    },
    "gpt2": {
        "model_type": "gpt2",
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "gpt-neox-tiny": {
        "model_type": "gpt_neox",
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
    },
    "qwen-tiny": {
        "model_type": "qwen3",
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 688,
        "tie_word_embeddings": True,
    },
    "lstm-tiny": {
        "model_type": "lstm",
        "hidden_size": 256,
        "num_hidden_layers": 2,
    },
    "lstm": {
        "model_type": "lstm",
        "hidden_size": 1024,
        "num_hidden_layers": 3,
        "dropout": 0.1,
    },
}
